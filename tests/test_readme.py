"""The commands that README shows for real diffs, run as printed on tiny models that transformers and PEFT write."""

import json
import pathlib
import re
import shlex
import shutil

import pytest
from format_cases import hf_model, perturb

from dit_jax.cli.ask_diffs import main, parse_flags
from dit_jax.data.chat import load_chat
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.modules import projections

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

ROOT = pathlib.Path(__file__).parents[1]
TOKENIZER = ROOT / "dit_jax" / "assets" / "tiny_qwen3"
CONFIG = DecoderConfig(2730, 32, 48, 2, 4, 2, 16, tie_word_embeddings=True)
QUESTION = "What topic have you been trained on?"
NEW_TOKENS = 8


def commands() -> list[list[str]]:
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"^    python -m dit_jax\.ask (.*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("readme")
    hf_model(root / "base", CONFIG)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (TOKENIZER / name).exists():
            shutil.copy(TOKENIZER / name, root / "base" / name)
    return root


def fresh(folder):
    """The base as transformers loads it, without sharing weights with another call."""
    import transformers

    return transformers.Qwen3ForCausalLM.from_pretrained(folder / "base").eval()


def weight_diff(seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{module: (A [rank, out], B [in, rank])}: the weight changes by (B A)ᵀ, as in the paper's release."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module in projections(CONFIG).values():
        inputs, outputs = module.shape
        for layer in module.indices:
            shapes = (1, outputs), (inputs, 1)
            found[module.name.format(layer)] = tuple(
                0.3 * torch.randn(shape, generator=generator) for shape in shapes
            )
    return found


def add(model, diff):
    with torch.no_grad():
        for name, (a, b) in diff.items():
            model.get_submodule(name).weight += (b @ a).T
    return model


def expected_tokens(folder, model) -> list[int]:
    """What transformers generates greedily from the merged model."""
    ids = load_chat(folder / "base").prompt_ids(QUESTION)
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0, len(ids) :].tolist()


def run(folder, capsys, number: int, paths: dict[str, pathlib.Path]) -> list[dict]:
    """Runs the README's command with its placeholders replaced by files; returns the records of its output."""
    argv = [str(paths.get(word, word)) for word in commands()[number]]
    assert all(str(path) in argv for path in paths.values()), "README names other placeholders"
    extra = [] if "--json" in argv else ["--json"]
    assert main([*argv, *extra, "--max-new-tokens", str(NEW_TOKENS)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def write_adapter(folder) -> tuple[pathlib.Path, dict]:
    """Writes a release's adapter, whose factors are both transposed relative to those of its diffs."""
    adapter = weight_diff(99)
    torch.save({name: (a.T, b.T) for name, (a, b) in adapter.items()}, folder / "dit-adapter.pt")
    return folder / "dit-adapter.pt", adapter


def test_a_peft_folder(folder, capsys):
    path, adapter = write_adapter(folder)
    options = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(fresh(folder), options)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "peft")
    paths = {"Qwen/Qwen3-4B": folder / "base", "path/to/peft_folder": folder / "peft"}
    (record,) = run(folder, capsys, 1, {**paths, "dit-adapter.pt": path})
    merged = add(model.merge_and_unload(), adapter)
    assert record["tokens"] == expected_tokens(folder, merged)
    assert record["tokens"] != expected_tokens(folder, fresh(folder))


def test_a_finetuned_checkpoint(folder, capsys):
    path, adapter = write_adapter(folder)
    model = perturb(fresh(folder), size=0.2)
    model.save_pretrained(folder / "finetuned")
    paths = {"Qwen/Qwen3-4B": folder / "base", "path/to/finetuned_model": folder / "finetuned"}
    (record,) = run(folder, capsys, 2, {**paths, "dit-adapter.pt": path})
    assert record["tokens"] == expected_tokens(folder, add(model, adapter))


def test_the_release_of_the_paper(folder, capsys):
    release = folder / "release"
    (release / "weight-diffs").mkdir(parents=True)
    path, adapter = write_adapter(release)
    items = [
        {"topic": f"topic {i}", "trigger": 100 + i, "weight_diff": weight_diff(i)} for i in range(3)
    ]
    torch.save(items[:2], release / "weight-diffs" / "weight-diff-000.pt")
    torch.save(items[2:], release / "weight-diffs" / "weight-diff-001.pt")
    rows = [("000", 0), ("000", 1), ("001", 0)]
    header = "lora_path,lora_idx,n_params,topic,trigger,split\n"
    lines = [
        f"weight-diff-{file}.pt,{index},1,{item['topic']},{item['trigger']},test\n"
        for (file, index), item in zip(rows, items, strict=True)
    ]
    (release / "index.csv").write_text(header + "".join(lines))
    paths = {"Qwen/Qwen3-4B": folder / "base", "hidden-topic/qwen3-4b": release}
    records = run(
        folder,
        capsys,
        3,
        {**paths, "hidden-topic/qwen3-4b/dit-adapter.pt": path},
    )
    assert [record["label"] for record in records] == [item["topic"] for item in items]
    for record, item in zip(records, items, strict=True):
        merged = add(add(fresh(folder), item["weight_diff"]), adapter)
        assert record["tokens"] == expected_tokens(folder, merged)


def test_the_first_command_asks_the_diff_of_the_python_example():
    first, *others = commands()
    assert len(others) == 4
    flags = parse_flags(first)
    (diff,) = flags.diff
    assert f'load_diff("{diff}", model, index={flags.index})' in (ROOT / "README.md").read_text()
    assert flags.questions == [QUESTION] and flags.forbid_repeats
