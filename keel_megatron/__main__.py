"""`python -m keel_megatron`: the `keel` command."""

import signal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C during the imports ends the process without a traceback (main() sets it again).
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from keel_megatron.cli.main import main

    main()
