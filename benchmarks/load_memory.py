"""Peak host memory of loading a model folder, against the size of its weights.

    python -m benchmarks.load_memory --shape qwen3-1.7b --dtype bfloat16

Writes a random folder of that shape with transformers (bf16, sharded), loads it in a fresh process, and
compares that process's peak resident memory, minus what it held before loading, with the weights' bytes.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

_CHILD = r"""
import json, re, sys, time
import jax
import jax.numpy as jnp
from dit_jax.api import load_model
import dit_jax.models.decoder, dit_jax.models.hf_checkpoint
jnp.zeros(()).block_until_ready()
def peak():  # ru_maxrss would start at what the parent process held
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
before, start = peak(), time.time()
model = load_model(sys.argv[1], sys.argv[2])
jax.block_until_ready(model.params)
weights = sum(x.nbytes for x in jax.tree.leaves(model.params))
print(json.dumps({"weights_bytes": weights, "peak_bytes": peak() - before, "seconds": time.time() - start}))
"""


def write_folder(folder: pathlib.Path, shape: str) -> None:
    import torch
    import transformers

    from dit_jax.models.families import hf_config
    from dit_jax.models.shapes import NAMED_CONFIGS

    config = transformers.AutoConfig.for_model(**hf_config(NAMED_CONFIGS[shape]))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="2GB")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_memory", description=__doc__)
    parser.add_argument("--shape", default="qwen3-1.7b")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--folder", help="an existing model folder instead of a new random one")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(flags.folder or temporary)
        if not flags.folder:
            start = time.time()
            write_folder(folder, flags.shape)
            print(f"wrote {folder} in {time.time() - start:.0f} s", file=sys.stderr)
        command = [sys.executable, "-c", _CHILD, str(folder), flags.dtype]
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode:
            sys.exit(out.stderr)
        row = json.loads(out.stdout)
    ratio = row["peak_bytes"] / row["weights_bytes"]
    print(json.dumps({**row, "ratio": round(ratio, 3), "shape": flags.shape, "dtype": flags.dtype}))


if __name__ == "__main__":
    main()
