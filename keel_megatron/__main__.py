"""`python -m keel_megatron`: the `keel` command."""

from keel_megatron.cli.main import main

if __name__ == "__main__":
    main()
