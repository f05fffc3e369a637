"""How many parameters does each part of a reward model have, and which of them are trained?

    python benchmarks/parameter_table.py                          # bundled reward and SD3.5-Medium, Markdown
    python benchmarks/parameter_table.py --json                   # one JSON line a model
    python benchmarks/parameter_table.py --model FOLDER           # any reward checkpoint
    python benchmarks/parameter_table.py --update docs/method.md  # write the table between its two markers

SD3.5-Medium is built at full size on the meta device: every name and shape, no memory and no download.
"""

import argparse
import json
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path

from dina_lrm import RewardModel
from dina_lrm.backbones.sd3 import SD35_MEDIUM

PARTS = {
    "pos_embed": "backbone: patch embedding",
    "time_text_embed": "backbone: noise level and pooled text",
    "context_embedder": "backbone: text projection",
    "transformer_blocks": "backbone: kept blocks",
    "lora": "LoRA",
    "layer_adapters_visual": "head: FiLM adapters, image",
    "layer_adapters_text": "head: FiLM adapters, text",
    "agg_visual": "head: aggregation, image",
    "agg_text": "head: aggregation, text",
    "attn1": "head: attention 1",
    "gates": "head: gates of attention 1",
    "attn2": "head: attention 2",
    "ff": "head: feed-forward",
    "query_tokens": "head: queries",
    "head": "head: output",
    "logistic": "logistic",
}
"""First part of a parameter's name, and what the table calls it; in table order."""

MARKERS = ("<!-- parameter-table:begin -->\n", "<!-- parameter-table:end -->")


def count_parts(model: RewardModel) -> Counter[str]:
    """Parameters by part. Position tables and the like are buffers, not parameters, and are not counted."""
    counts: Counter[str] = Counter()
    for name, parameter in model.backbone.parts.named_parameters():
        counts["lora" if "lora_" in name else name.split(".")[0]] += parameter.numel()
    for name, parameter in model.head.named_parameters():
        part = "gates" if ".gate_" in name else name.split(".")[0]
        counts["ff" if part == "norm_ff" else part] += parameter.numel()
    counts["logistic"] = model.num_parameters()["logistic"]
    assert counts.total() == model.num_parameters()["total"]
    return counts


def sd35_medium() -> RewardModel:
    """The paper's recipe: 12 of 24 blocks, taps 4, 8, 12 in both streams, LoRA of rank 64."""
    return RewardModel.initialize(
        SD35_MEDIUM,
        num_blocks=12,
        image_taps=(4, 8, 12),
        text_taps=(4, 8, 12),
        lora_rank=64,
        lora_alpha=128.0,
        device="meta",
    )


def markdown(models: dict[str, RewardModel]) -> str:
    """One row a part, one column a model; parts that no model has are left out."""
    counts = [count_parts(model) for model in models.values()]
    lines = [f"| part | {' | '.join(models)} |", f"|---|{'---:|' * len(models)}"]
    others = sorted(set().union(*counts) - set(PARTS))  # the modules of other families by their own names
    for part, label in {**{part: f"backbone: {part}" for part in others}, **PARTS}.items():
        if any(column[part] for column in counts):
            lines.append(f"| {label} | {' | '.join(f'{column[part]:,}' for column in counts)} |")
    for label, key in (("trained", "trainable"), ("all", "total")):
        numbers = [model.num_parameters()[key] for model in models.values()]
        lines.append(f"| **{label}** | {' | '.join(f'**{number:,}**' for number in numbers)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", action="append", help="a reward checkpoint; default: bundled and SD3.5-Medium"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON line a model instead of a Markdown table"
    )
    parser.add_argument(
        "--update", type=Path, metavar="FILE", help="write the table between its markers in FILE"
    )
    arguments = parser.parse_args()

    if arguments.model:
        models = {name: RewardModel.from_pretrained(name) for name in arguments.model}
    else:
        models = {"SD3.5-Medium": sd35_medium()}
        if (files("dina_lrm") / "shapes" / "weights" / "reward" / "config.json").is_file():
            models = {"bundled": RewardModel.from_pretrained("bundled"), **models}
        else:
            print("no bundled reward in this installation: its column is left out", file=sys.stderr)

    if arguments.json:
        for name, model in models.items():
            print(json.dumps({"model": name, **model.num_parameters(), "parts": count_parts(model)}))
    else:
        print(markdown(models), end="")
    if arguments.update is not None:
        before, rest = arguments.update.read_text(encoding="utf-8").split(MARKERS[0])
        _, after = rest.split(MARKERS[1])
        text = before + MARKERS[0] + markdown(models) + MARKERS[1] + after
        arguments.update.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
