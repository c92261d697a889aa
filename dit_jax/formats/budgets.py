"""How much the reading of a stranger's files may take: every limit that follows from no other place.

A limit leaves room for the largest real files (models of 400 GB, vocabularies of 300,000 tokens, releases of 100,000
diffs), and stops a small file from asking for much. The tests count what each costs.
"""

import pathlib

# Tokenizers and chat templates (`data.tokenizer_process`), which run in a process of their own.
TOKENIZER_BYTES = 512 * 2**20  # memory that rendering and cutting texts may take
TOKENIZER_BYTES_PER_BYTE = 32  # of its files, while a tokenizer is loaded
TOKENIZER_SECONDS = 2.0  # of CPU time, for one text, which takes milliseconds
CHARACTERS_PER_SECOND = 50_000  # longer texts may take longer
LOADING_SECONDS = 25.0  # the largest vocabularies take three
MAX_CHARACTERS = 1_000_000  # of one text: twice as many may take more than TOKENIZER_BYTES
MAX_TOKENS = 4_000_000  # of what a template makes of it
MAX_REPLY_BYTES = 128 * 2**20
MAX_TOKENIZERS = 32  # kept in the process; others are loaded again when they are asked for

# Memory that the content of a file may take: its own bytes and as much again for copies and padding.
HELD_TIMES = 4
HELD_BYTES = 256 * 2**20
PADDED_BYTES = 16 * 2**20

MAX_TEXT_BYTES = 2**30  # of a text that is read whole: 100,000 diffs have an index of 50 MB

GGUF_ENTRY = 700  # bytes that the library `gguf` takes for each entry of a list

# A compressed table unpacks to more; texts compress to a tenth, more rarely.
TABLE_TIMES = 64

ROW_BYTES = 128  # that a row of a corpus takes beside its texts
GROUP_BYTES = 1_024  # and a topic

MAX_FOLDER_DEPTH = 32
MAX_FOLDER_ENTRIES = 200_000
MAX_LAYER_PATTERNS = 64  # of PEFT's layers_pattern

# What a calibration, which comes with an adapter, makes an audit ask.
MAX_BATTERY_TOKENS = 100_000  # of all answers about a diff; a default battery takes 80
MAX_QUESTION = 10_000  # characters


def padded_bytes(size: int) -> int:
    """Memory that LoRAs of so many bytes may take as one array of equal ranks, of which an audit holds several."""
    return HELD_TIMES * size + PADDED_BYTES


def held_bytes(size: int) -> int:
    """Memory that may be held for a file, or for arrays, of so many bytes."""
    return HELD_TIMES * size + HELD_BYTES


def table_bytes(size: int) -> int:
    """Bytes that a compressed table of so many bytes may unpack to."""
    return TABLE_TIMES * size + HELD_BYTES


def tokenizer_bytes(path: pathlib.Path) -> int:
    """Memory that loading the tokenizer of a folder, or of a GGUF file, may take."""
    if path.is_file():
        return TOKENIZER_BYTES + path.stat().st_size  # the file is mapped
    files = (
        file for file in path.iterdir() if file.suffix in (".json", ".jinja") and file.is_file()
    )
    return TOKENIZER_BYTES + TOKENIZER_BYTES_PER_BYTE * sum(file.stat().st_size for file in files)


def tokenizer_seconds(characters: int) -> float:
    """CPU seconds that rendering and cutting a text of so many characters may take."""
    return TOKENIZER_SECONDS + characters / CHARACTERS_PER_SECOND
