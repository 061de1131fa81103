"""Tiny random models with a real tokenizer and chat template, a little text, and a hub on loopback:
all that the fast tests run on.
"""

import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path

import hub

# Set before anything imports huggingface_hub, which reads these once.
os.environ["HF_ENDPOINT"] = hub.serve()
os.environ["HF_HOME"] = str(hub.HUB / "home")
os.environ["HF_HUB_OFFLINE"] = "0"
os.environ["HF_TOKEN"] = ""
# The models are tiny, so threads would only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

# tqdm's own lock is shared with forks: one that a test kills while it draws would keep it for ever.
tqdm.set_lock(threading.RLock())

pytest_plugins = ["paper_hub"]  # its fixtures
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TEXT = [
    "The old mill stands by the river, and its wheel has not turned for years.",
    "She asked what the capital of France is, and he answered that it is Paris.",
    "नेपाल दक्षिण एसियामा अवस्थित एक देश हो। यसको राजधानी काठमाडौँ हो।",
    "आज मौसम राम्रो छ र हामी बजार जाँदैछौं।",
    "Rain fell on the hills; the children ran home laughing.",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
)


def heads(of_keys, tied):
    return dict(num_key_value_heads=of_keys, tie_word_embeddings=tied)


MODELS = {
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, heads(4, tied=False)),
    "llama": (LlamaConfig, LlamaForCausalLM, heads(2, tied=True)),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, heads(2, tied=False)),
}


def tiny_tokenizer():
    """Return a byte-level BPE of 400 tokens.

    <|endoftext|> is 0, <|im_start|> 1, and <|im_end|> 2, the end-of-text token as in chat models.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_model(folder, kind="llama", seed=0, **sizes):
    """Save a model of a kind of MODELS and its tokenizer. All weights are random, norms too."""
    tokenizer = tiny_tokenizer()
    config, architecture, extra = MODELS[kind]
    torch.manual_seed(seed)
    model = architecture(config(vocab_size=len(tokenizer), **SIZES | extra | sizes))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.copy_(1 + 0.3 * torch.randn_like(p))
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def forked(main, argv, before=lambda: None):
    """Start main(argv) in a copy of this process, with nothing to import. Return its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        sys.stdout = open(os.devnull, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" ignores it
        before()
        main([str(a) for a in argv])
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        os._exit(code)


def limit_file_size(limit, errors):
    """Return what `forked` does first to let no file grow beyond `limit` bytes, as on a full disk.

    stderr goes to the file `errors`.
    """

    def before():
        sys.stderr = open(errors, "w", buffering=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return before


@pytest.fixture()
def refused(capsys):
    """refused(main, *argv): the one line of error with which main(argv) ends, with exit code 2."""

    def run(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in argv])
        said = capsys.readouterr().err
        script = Path(sys.modules[main.__module__].__file__).name
        if "chat_eval" in script:  # which says its own name where it is the process
            script = "evaluate.py"
        (line,) = [line for line in said.splitlines() if " error: " in line]
        assert stopped.value.code == 2 and f"{script}: error: " in line, line  # after a bar's codes
        assert "Traceback" not in said
        return line

    return run


@pytest.fixture(scope="session")
def olmo2(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("olmo2"), "olmo2")


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Target training text, `text` rows."""
    rows = [{"text": f"{TEXT[i % 5]} {i} {TEXT[(i * 7 + 2) % 5]}"} for i in range(60)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", rows)


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """Calibration chats, `messages` rows."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{TEXT[i % 5]} {i}?"},
                {"role": "assistant", "content": TEXT[(i + 1) % 5]},
            ]
        }
        for i in range(40)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", rows)
