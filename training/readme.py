"""README.md of an output folder: the exact commands for what lies in it, and what will not carry over."""

from pathlib import Path
from typing import Any


def write_readme(folder: Path, config: Any, family: Any) -> None:
    """Write the file. config is training.config.Config, family the model's."""
    picture = "vision" in family.parts
    sections = [f"# {folder.name}", made_by(folder, config), ask(folder, picture)]
    sections.append(adapter(folder, config, family) if config.use_lora else whole_model(folder, family))
    sections.append(limits(config, family))
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def made_by(folder: Path, config: Any) -> str:
    rows = f"`{config.data_path}`" if not config.demo else "the rows of the built-in task"
    return (
        f"`{config.base_model}` trained on {rows} ({config.stage}). `report.html` shows the run, `journal.jsonl` every step, "
        f"and `python train.py --config {folder}/run.yaml --output_dir ANOTHER` makes it again."
    )


def ask(folder: Path, picture: bool) -> str:
    image = " --image screenshot.png --draw answer.png" if picture else ""
    return (
        "## Ask it\n\nIn the trainer's folder:\n\n```bash\n"
        f'python -m eval ask --model {folder}{image} "your question"\n'
        f"python -m eval --model {folder} --data_path rows.jsonl --task text\n```"
    )


def adapter(folder: Path, config: Any, family: Any) -> str:
    """Merge, peft, serving: for a run that trained an adapter."""
    base = config.base_model
    if config.peft_type == "PREFIX_TUNING":
        merge = "A prefix cannot be merged into weights: it is keys and values that every layer sees first."
    else:
        merge = (
            "## Merge into the 16-bit base\n\n```bash\n"
            f"python -m lora merge --base_model {base} --adapter {folder}/adapter --output_dir {folder}/merged\n```\n\n"
            "The merged folder has the base's own tensor names, shards, config and tokenizer files; serve it as you serve the "
            f"base, e.g. `vllm serve {folder}/merged`."
        )
    return f"{merge}\n\n## Open it without this trainer\n\n{in_python(base, folder, family)}"


def in_python(base: str, folder: Path, family: Any) -> str:
    if not family.opens_in_transformers:
        return (
            "The adapter names the modules of the model's ORIGINAL code. With that code loaded as `model`:\n\n```python\n"
            f'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, "{folder}/adapter")\n```'
        )
    auto = "AutoModelForImageTextToText" if "vision" in family.parts else "AutoModelForCausalLM"
    return (
        f"transformers >= {family.opens_in_transformers}:\n\n```python\n"
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("{base}", dtype="bfloat16")\n'
        f'model = PeftModel.from_pretrained(model, "{folder}/adapter")\n```'
    )


def whole_model(folder: Path, family: Any) -> str:
    return (
        "## Open it without this trainer\n\n`model/` is a whole checkpoint in the base's own tensor names, with every other "
        f"file of the base beside it byte for byte: use it wherever the base is used, e.g. `vllm serve {folder}/model`."
    )


def limits(config: Any, family: Any) -> str:
    """What the numbers of the run do not promise elsewhere."""
    lines = ["## What does not carry over\n"]
    if config.use_8bit or config.use_4bit:
        bits = "an 8" if config.use_8bit else "a 4"
        lines.append(
            f"- The adapter was trained beside {bits}-bit base. On the 16-bit base (merged too) answers differ a little; "
            "`lora merge` measures by how much on rows of yours."
        )
    if config.max_pixels:
        lines.append(f"- Pictures had at most {config.max_pixels} pixels. Set this limit where you serve it, or boxes shift.")
    if config.box_format != "keep" and family.box_convention:
        unit = {"pixels": "pixels of the picture as the model sees it"}.get(family.box_convention.unit, "thousandths")
        lines.append(f"- Boxes in prompts and answers count {unit}; the rows' counted {config.box_format}.")
    lines.append("- Sampling settings of generation_config.json are the base's; the evaluation here is greedy.")
    return "\n".join(lines)
