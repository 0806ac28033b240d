"""Examples at the end of each command's `--help`; the tests parse them."""

from __future__ import annotations

from typing import Final

EXAMPLES: Final[dict[str, tuple[str, ...]]] = {
    "train": (
        "keel train yaml/demo.yaml",
        "keel train yaml/demo.yaml model.residual=pre_ln training.name=pre_ln",
        "keel train yaml/paper/keel_1024.yaml --processes 8 --max-restarts 3",
        "torchrun --nnodes 4 --nproc-per-node 8 ... -m keel_megatron train CONFIG",
    ),
    "plan": (
        "keel plan yaml/demo.yaml --gpu cpu",
        "keel plan yaml/paper/keel_1024.yaml --gpus 64 --gpu h100 --plot plan.png",
        "keel plan yaml/paper/keel_1024.yaml --gpus 64 --search",
        "keel plan yaml/demo.yaml --json",
    ),
    "bench": (
        "keel bench yaml/demo.yaml",
        "keel bench yaml/demo.yaml --compare model.residual=pre_ln,keel",
        "keel bench yaml/demo.yaml --profile trace.json.gz --out bench.json",
    ),
    "depth": (
        "keel depth runs/demo",
        "keel depth runs/demo --quantity gradient_norm --step 100",
    ),
    "runs": (
        "keel runs",
        "keel runs runs/demo /shared/runs --json",
    ),
    "dashboard": (
        "keel dashboard",
        "keel dashboard /shared/runs --port 0 --open",
    ),
    "doctor": (
        "keel doctor",
        "keel doctor yaml/demo.yaml --processes 2",
    ),
    "completion": (
        "keel completion bash >> ~/.bashrc",
        "keel completion zsh > ~/.zfunc/_keel",
        "keel completion fish > ~/.config/fish/completions/keel.fish",
    ),
    "generate": (
        "keel generate runs/demo --prompt 'def read_lines(path):'",
        "keel generate runs/demo --prompts prompts.jsonl --out answers.jsonl --temperature 0",
        "keel generate runs/chat --chat --prompt 'What is a residual stream?'",
    ),
    "evaluate": (
        "keel evaluate runs/demo --text 'texts/*.txt'",
        "keel evaluate runs/demo --tasks arc_easy,piqa --limit 100 --json",
        "keel evaluate runs/demo --tasks hellaswag --step 55 --processes 2",
    ),
    "lm-eval": ("keel lm-eval run --model keel --model_args run=runs/demo --tasks arc_easy",),
    "export": (
        "keel export runs/demo --out exported/demo",
        "keel export runs/demo --out exported/demo --step 55 --dtype bf16",
    ),
    "import": ("keel import exported/demo --out runs/imported",),
    "checkpoint list": (
        "keel checkpoint list runs/demo",
        "keel checkpoint list runs/demo --json",
    ),
    "checkpoint verify": ("keel checkpoint verify runs/demo",),
    "checkpoint show": (
        "keel checkpoint show runs/demo",
        "keel checkpoint show runs/demo --step 55",
    ),
    "checkpoint prune": ("keel checkpoint prune runs/demo --keep 2 --keep-every 100",),
    "config show": ("keel config show yaml/demo.yaml model.alpha=64",),
    "config folder": ("keel config folder yaml/demo.yaml",),
    "config list": ("keel config list",),
    "config copy": ("keel config copy demo my.yaml",),
    "config schema": ("keel config schema > keel.schema.json",),
    "data build": (
        "keel data build yaml/demo.yaml",
        "keel data build yaml/demo.yaml data.text=corpus.jsonl --out datasets/corpus --workers 8",
        "keel data build yaml/demo.yaml --executor slurm --tasks 32 --sbatch '--partition=cpu'",
    ),
    "data show": (
        "keel data show yaml/demo.yaml",
        "keel data show datasets/corpus --json",
    ),
    "data verify": ("keel data verify datasets/corpus",),
    "data sample": ("keel data sample yaml/demo.yaml --step 10 --samples 2",),
    "data task": ("keel data task datasets/corpus.partial --task 0 --tasks 32",),
    "study alpha": ("keel study alpha yaml/studies/quick.yaml --plan",),
    "study max-learning-rate": (
        "keel study max-learning-rate yaml/studies/quick.yaml --rules keel,pre_ln",
    ),
    "study depth-scaling": (
        "keel study depth-scaling yaml/studies/quick.yaml --depths 16,32 --seeds 3",
    ),
    "study deep-versus-wide": ("keel study deep-versus-wide yaml/studies/quick.yaml --plan",),
    "study depth-tasks": (
        "keel study depth-tasks yaml/studies/quick.yaml --tasks hops,chain data.seq_length=64",
    ),
    "study gradient-flow": ("keel study gradient-flow --rules keel,post_ln --depths 64,256",),
    "study redundancy": ("keel study redundancy runs/keel runs/pre_ln --unit block",),
    "study stream-precision": (
        "keel study stream-precision yaml/studies/quick.yaml --streams fp32,bf16",
    ),
    "study coordinate-check": ("keel study coordinate-check yaml/studies/quick.yaml --plan",),
    "study optimizers": ("keel study optimizers yaml/studies/quick.yaml --plan",),
    "track sync": (
        "keel track sync runs/demo",
        "keel track sync runs/demo --rebuild",
    ),
}
"""By the command's words after `keel`."""
