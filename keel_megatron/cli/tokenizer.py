"""`keel tokenizer`."""

from __future__ import annotations

import typer

from keel_megatron.cli.arguments import ConfigPath, Overrides

app = typer.Typer(help="Train tokenizers.", no_args_is_help=True)


@app.command("train")
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the tokenizer on the training data, or show where it is; then encode an example."""
    from keel_megatron.config.load import load_config
    from keel_megatron.data.prepare import prepare
    from keel_megatron.data.tokenizer import Tokenizer

    data = prepare(load_config(config, overrides or ()), print)
    tokenizer = Tokenizer(data.tokenizer_path)
    example = "The quick brown fox:\n\treturn None"
    tokens = tokenizer.encode(example)
    print(f"tokenizer   {data.tokenizer_path}  {tokenizer.vocab_size} pieces")
    print(f"example     {example!r} -> {len(tokens)} tokens {tokens}")
