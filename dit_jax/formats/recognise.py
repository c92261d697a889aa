"""What files and folders are that hold no weights as they are, and the command that makes weights of them."""

import re
from collections.abc import Collection, Iterable, Sequence

QUANTISED = (
    "its weights are quantised. Save them dequantised, with transformers 'model.dequantize().save_pretrained(OUT)', "
    "with MLX 'mlx_lm.convert --dequantize', or give the model that was quantised"
)
HEAD_BYTES = 512  # of a file, enough for `what_file`


def what_file(head: bytes) -> str:
    """What a file is that is not what its name says, with the remedy, by its first bytes; "" if they do not tell."""
    text = head[:HEAD_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n")
    if not text:
        return "is empty: get it again" if not head.strip() else ""
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a Git LFS pointer and not the file itself: run 'git lfs pull' in its folder"
    if text.startswith(b"# xet version"):
        return "is a Git Xet pointer and not the file itself: run 'git xet install' and 'git pull' in its folder"
    lower = text.lower()
    if lower.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page and not the file itself: download it again ('hf download', after 'hf auth login')"
    if lower.startswith((b"entry not found", b"invalid username or password", b"access to model")):
        return "is an error of the hub and not the file: download it again ('hf download', after 'hf auth login')"
    if text.startswith(b"GGUF"):
        return "is a GGUF file: give it a name that ends in .gguf"
    if text.startswith(b"\x89HDF\r\n"):
        return "is an HDF5 file of TensorFlow: save the model with save_pretrained as model.safetensors"
    if text.startswith(b"\x93NUMPY"):
        return "is a numpy array, not a file of named weights: save them as safetensors"
    if text.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd", b"Rar!", b"7z\xbc\xaf")):
        return "is compressed: unpack it first"
    return ""


def what_table(head: bytes) -> str:
    """Why a text file is no table in UTF-8, with the remedy, by its first bytes; "" if they do not tell."""
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    what = "" if marked else what_file(head)
    if marked or (not what and b"\0" in head[:HEAD_BYTES]):
        return "is UTF-16 or UTF-32 text: save it as UTF-8 ('iconv -f utf-16 -t utf-8 OLD > NEW')"
    return what


def what_separator(header: Sequence[str]) -> str:
    """What separates the columns of a table whose header was read as one column; "" if nothing else does."""
    if len(header) == 2 and header[0].startswith("sep="):  # a line of Excel's: "sep=,"
        return "begins with a line 'sep=' of Excel: remove it"
    if len(header) != 1:
        return ""
    if header[0].startswith("sep="):
        return "begins with a line 'sep=' of Excel: remove it, and separate the columns by commas"
    for char, name in (
        (";", "a semicolon ';'"),
        ("\t", "a tab"),
        ("|", "a bar '|'"),
        (",", "a comma"),
    ):
        if char in header[0]:
            return f"separates its columns by {name}: separate them by commas (.csv) or tabs (.tsv)"
    return ""


# What tells a kind of folder: a file or folder in it whose name matches, what it is, and the remedy.
_FOLDERS: tuple[tuple[str, str], ...] = (
    (
        r"zero_to_fp32\.py|global_step\d+|(bf16_|fp16_)?zero_pp_rank_.*|mp_rank_\d+_model_states\.pt",
        "is a DeepSpeed checkpoint, whose weights are in the shards of its optimizer: run "
        "'python zero_to_fp32.py . OUT' in it and give OUT, with config.json beside the weights",
    ),
    (
        r"pytorch_model_fsdp_\d+",
        "is a sharded FSDP checkpoint: run 'accelerate merge-weights FOLDER/pytorch_model_fsdp_0 OUT' and give OUT, "
        "with config.json beside the weights",
    ),
    (
        r"model_world_size_\d+_rank_\d+\.pt",
        "is a sharded FSDP checkpoint of verl: run 'python -m verl.model_merger merge --backend fsdp "
        "--local_dir FOLDER --target_dir OUT' and give OUT",
    ),
    (
        r".*\.distcp",
        "is a sharded (FSDP, torch.distributed) checkpoint: run 'python -m torch.distributed.checkpoint.format_utils "
        "dcp_to_torch FOLDER OUT.pt' and give OUT.pt",
    ),
    (
        r"latest_checkpointed_iteration\.txt|iter_\d{7}|mp_rank_\d+|distrib_optim\.pt",
        "is a Megatron checkpoint: export it in Hugging Face format (Megatron-Bridge: AutoBridge.export_ckpt) and give "
        "that folder",
    ),
    (
        r"consolidated(\.\d+)?\.(pth|safetensors)",
        "holds weights in the original format of Meta or Mistral: convert them with transformers' "
        "convert_llama_weights_to_hf.py (or convert_mistral_weights_to_hf.py) and give that folder",
    ),
    (
        r"tf_model\.h5|flax_model\.msgpack|flax_model-\d+-of-\d+\.msgpack",
        "holds weights of TensorFlow or Flax: load it with from_pretrained(…, from_tf=True or from_flax=True) of "
        "transformers 4, and save it with save_pretrained",
    ),
    (
        r"(adapters|weights)(\.\d+)?\.npz",
        "holds weights in the old .npz format of MLX: convert them with a current mlx-lm",
    ),
    (r".*\.onnx", "holds an ONNX model: give the model that it was exported from"),
    (r".*\.nemo", "holds a NeMo archive: export it in Hugging Face format and give that folder"),
    (
        r".*\.ckpt",
        "holds a Lightning checkpoint: save the model in it with save_pretrained and give that folder",
    ),
)


def what_checkpoint(names: Iterable[str]) -> str:
    """Which program's checkpoint a folder with entries of these names is, with the remedy; "" if they do not tell."""
    names = sorted(names)
    kinds = (said for pattern, said in _FOLDERS if any(re.fullmatch(pattern, n) for n in names))
    return next(kinds, "")


def what_folder(names: Iterable[str]) -> str:
    """What a folder with entries of these names is, with the remedy; "" if they do not tell."""
    names = sorted(names)
    return what_checkpoint(names) or _other_weights(names)


def is_trainer_state(name: str) -> bool:
    """Whether a file of this name is what trainers keep beside the weights."""
    return re.fullmatch(_TRAINERS, name) is not None


def adapter_file(names: Iterable[str]) -> str | None:
    """The file of these names that holds the weights of an adapter; None: there is none."""
    return next((name for name in names if re.fullmatch(_ADAPTERS, name)), None)


def _other_weights(names: Collection[str]) -> str:
    """Weights under a name of their own, and folders that hold everything but weights."""
    adapter = adapter_file(names)
    if adapter is not None and "adapter_config.json" not in names:
        return f"holds {adapter!r} and no adapter_config.json, which has its scale: get the complete folder"
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth"))]
    weights = [name for name in weights if not is_trainer_state(name)]
    if weights:
        return f"holds {weights[0]!r}, which is no name of a model's weights: give that file itself, which is read"
    if any(is_trainer_state(name) or name == "trainer_state.json" for name in names):
        return "holds the state of a trainer and no weights: get the complete checkpoint"
    if "tokenizer.json" in names or "tokenizer_config.json" in names:
        return "holds a tokenizer and no weights: get the complete folder"
    return ""


_ADAPTERS = r"adapter_model\.(safetensors|bin)|adapters\.safetensors"
_TRAINERS = r"(optimizer|scheduler|training_args|rng_state(_\d+)?|scaler|random_states_\d+)\.(pt|pth|bin|pkl)"
