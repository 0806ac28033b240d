"""`keel data`."""

from __future__ import annotations

import typer

from keel_megatron.cli import data_folders
from keel_megatron.cli.arguments import ConfigPath, Overrides

app = typer.Typer(help="Build and inspect datasets.", no_args_is_help=True)
app.command("show")(data_folders.show)
app.command("verify")(data_folders.verify)
app.command("sample")(data_folders.sample)


@app.command("build")
def build(config: ConfigPath, overrides: Overrides = None) -> None:
    """Tokenize the training data into Megatron's indexed format, or show where it is."""
    from keel_megatron.config.load import load_config
    from keel_megatron.data.prepare import prepare

    data = prepare(load_config(config, overrides or ()), print)
    print(f"training    {data.train_prefix}.bin  {data.train_tokens:,} tokens")
    print(f"validation  {data.validation_prefix}.bin  {data.validation_tokens:,} tokens")
