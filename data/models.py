"""Which models the stages take: what config.json, the tokenizer and the weight files must be.

All stages ask here first. score.py also needs matrices that are nn.Linear.
"""

import datetime
import types
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import chat_template_utils

# What transformers raises for files that are missing, damaged, or of another kind of model.
BAD_MODEL = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError)
BAD_MODEL += (ArithmeticError, AssertionError, SafetensorError, StrictDataclassError, HTTPError)
NO_LIMIT = 2**40  # positions
# Not the end of a chat turn. In Gemma's vocabulary, "</s>" is a tag of HTML.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "<EOS_TOKEN>", "</s>")
DATE = datetime.datetime(2025, 1, 1)  # "today" in chat templates that write a date
ENCODERS = ("bert-generation", "trocr", "xlnet")  # these do not say so in their config


def context_of(config):
    """Return how many positions a model has, NO_LIMIT if it has no limit."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len"):  # max_seq_len: of MPT
        positions = getattr(text, name, None)
        if positions is not None:
            return positions
    return NO_LIMIT


def check_path(name, fail):
    """Fail if there is no file or directory of this name, and it can be no hub id."""
    is_path = str(name).startswith((".", "/", "~")) or str(name).count("/") > 1
    if is_path and not Path(name).exists():
        fail(f"model {name}: no such directory. Give a model directory or a hub id")


def load_config(name, fail):
    """Return the config of a text-only decoder that has attention and unquantized weights.

    name: directory or hub id. fail(message) is called for any other model, and must not return.
    """
    check_path(name, fail)
    folder = Path(name)
    if folder.is_file() or (folder.is_dir() and not (folder / "config.json").is_file()):
        fail(f"model {name} is no directory with a config.json. Give one: of a run, OUT/model")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        text = config.get_text_config()
        positions = context_of(config)
    except BAD_MODEL as error:
        fail(f"model {name} cannot be read: {error}")
    kind = config.model_type
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING or kind in ENCODERS
    if masked or config.is_encoder_decoder:
        fail(f"model {name}: {kind} has an encoder. Give a decoder-only model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        fail(f"model {name}: {kind} is not a causal language model. Give one")
    if text is not config:
        fail(f"model {name}: {kind} also reads images or sound. Give a text-only model")
    if not hasattr(text, "num_attention_heads"):
        fail(f"model {name}: {kind} has no attention. Give a transformer")
    if getattr(config, "quantization_config", None):
        fail(f"model {name}: its weights are quantized. Give the unquantized model")
    if positions < 1:
        fail(f"model {name}: config.json allows {positions} positions. Repair it")
    return config


def load_tokenizer(name, rows, fail):
    """Return the tokenizer, whose ids are below `rows`, the number of embeddings."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        vocabulary = tokenizer.get_vocab()
    except BAD_MODEL as error:
        fail(f"model {name}: its tokenizer cannot be read: {error}")
    except Exception as error:
        if type(error) is not Exception:  # what tokenizers raises for any damage
            raise
        fail(f"model {name}: its tokenizer cannot be read: {error}")
    size = max(vocabulary.values(), default=-1) + 1
    unused = 0
    while size - unused > rows and stands_in_no_text(tokenizer, size - unused - 1):
        unused += 1
    if not 0 < size - unused <= rows:
        fail(f"model {name}: {size} tokens, but {rows} embeddings. Check its tokenizer")
    return tokenizer


def stands_in_no_text(tokenizer, i):
    """Return whether no text has token i, so that it needs no embedding: Gemma 3 1B's of images."""
    token = tokenizer.added_tokens_decoder.get(i)
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    if token is None or not token.special or token.content in named:
        return False
    return token.content not in str(tokenizer.chat_template)


@lru_cache
def end_of_text(tokenizer, fail):
    """Return the token that ends a document of raw text, and its id."""
    vocabulary = tokenizer.get_vocab()
    token = next((token for token in END_OF_TEXT if token in vocabulary), tokenizer.eos_token)
    if token not in vocabulary:
        fail("the tokenizer has no end-of-text token for raw text. Set eos_token")
    return token, vocabulary[token]


def stop_clock():
    """Make it DATE in all chat templates, so that no result depends on the day."""
    chat_template_utils.datetime = types.SimpleNamespace(now=lambda: DATE)


def check_unknown(tokenizer, unknown, total, what, fail):
    """Call fail if more than 1% of the tokens are <unk>: the tokenizer does not know the script.

    <unk> everywhere is easy to predict, so that all numbers would look splendid.
    """
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    special.append(end_of_text(tokenizer, fail)[1])
    share = unknown / max(1, total)
    if share > 0.01 and tokenizer.unk_token_id not in special:
        fail(f"{what}: {share:.1%} of the tokens are <unk>. Choose a model that knows the script")


def build_skeleton(name, fail):
    """Return (the model on the meta device: shapes without weights, its number of embeddings)."""
    config = load_config(name, fail)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return model, model.get_input_embeddings().num_embeddings
    except BAD_MODEL as error:
        fail(f"model {name} cannot be built: {error}")


def load_skeleton(name, fail):
    """Return (the model without weights, its tokenizer)."""
    model, rows = build_skeleton(name, fail)
    return model, load_tokenizer(name, rows, fail)


def load_weights(name, fail, **options):
    """Return the model. Fail if a tensor is missing, because it would be initialized randomly.

    generation_config.json is not read: it says how to sample, and may be one that no model takes.
    """
    options |= {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    options["generation_config"] = GenerationConfig()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(name, **options)
    except BAD_MODEL as error:
        fail(f"model {name} cannot be loaded: {error}")
    if getattr(model, "_hf_peft_config_loaded", False):
        fail(f"model {name}: adapter_config.json adds an adapter. Merge it and remove the file")
    if info["missing_keys"]:
        fail(f"model {name}: its files lack {sorted(info['missing_keys'])[:3]}. Copy it again")
    if unused := sorted(info["unexpected_keys"]):  # of a head for speculation, or by a mistake
        print(f"model {name}: {len(unused)} tensors of its files are not used: {unused[0]}, ...")
    return model


def embeddings_and_head(model):
    """Return the names of the parameters that SSU always trains (Section 3.1)."""
    always = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():
            always |= {id(p) for p in module.parameters(recurse=False)}
    return {name for name, p in model.named_parameters() if id(p) in always}
