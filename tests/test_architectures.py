"""The stages on tiny models of many architectures, each against plain rows one by one.

Scores are compared with float64, where each norm is solved for its normalized input; frozen weights
with the source, bit by bit; log-likelihoods with a forward pass of each row alone. What a stage
refuses, it refuses by name, and evaluate.py refuses what is no causal transformer.
"""

import json
import math
import os

import pytest
import torch
from conftest import SIZES, TEXT, forked, limit_file_size, tiny_tokenizer, write_jsonl
from safetensors.torch import load_file
from test_evaluate import reference_loglik
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import evaluate
import make_mask
import score
import train

OLD = dict(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1)
OLD |= dict(eos_token_id=2)
TWO_KEYS = dict(num_key_value_heads=2)
WINDOW = TWO_KEYS | dict(sliding_window=16)
HEADS_OF_8 = dict(num_key_value_heads=2, head_dim=8, sliding_window=16)
EXPERTS = dict(num_local_experts=2, num_key_value_heads=2)
BART = dict(vocab_size=400, d_model=32, decoder_layers=1, encoder_layers=1, decoder_ffn_dim=32)
BART |= dict(encoder_ffn_dim=32, decoder_attention_heads=2, encoder_attention_heads=2)
MIXED = dict(num_key_value_heads=2, conv_L_cache=3, layer_types=["conv", "full_attention"])

# kind: (model_type, config, what score.py and make_mask.py --method hft say or None,
#        what train.py without a mask says, what evaluate.py says)
SCORED = {
    "llama": ("llama", TWO_KEYS | dict(attention_bias=True)),
    "olmo2": ("olmo2", {}),
    "qwen3": ("qwen3", dict(head_dim=8, num_key_value_heads=2)),
    "phi": ("phi", dict(qk_layernorm=True, num_key_value_heads=4)),
    "cohere": ("cohere", TWO_KEYS),
    "gemma3": ("gemma3_text", HEADS_OF_8),
    "gemma2": ("gemma2", HEADS_OF_8),
    "mistral": ("mistral", WINDOW),
    "olmo3": ("olmo3", WINDOW),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)),
    "gptj": ("gptj", OLD | dict(rotary_dim=4)),
    "gpt_neo": (
        "gpt_neo",
        dict(hidden_size=32, num_layers=2, num_heads=4, window_size=16, max_position_embeddings=512)
        | dict(attention_types=[[["global", "local"], 1]], intermediate_size=48),
    ),
    "bloom": ("bloom", dict(hidden_size=32, n_layer=2, n_head=4)),
    "mpt": ("mpt", dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=512)),
    "falcon": ("falcon", dict(alibi=True, new_decoder_architecture=False, multi_query=False)),
    "stablelm": ("stablelm", dict(num_key_value_heads=4)),
    "apertus": ("apertus", TWO_KEYS),
    "diffllama": ("diffllama", TWO_KEYS),
    "granite": ("granite", TWO_KEYS),
}
# kind: (model_type, config, a word of the refusal of score.py, whether train.py and evaluate.py
# take it without a mask)
REFUSED = {
    "gpt2": ("gpt2", OLD, "Conv1D", True),
    "mixtral": ("mixtral", EXPERTS, "cannot be scored", True),
    "lfm2": ("lfm2", MIXED, "cannot be scored", True),
    "mamba": ("mamba", dict(state_size=4), "no attention", False),
    "bert": ("bert", dict(is_decoder=True), "encoder", False),
    "bart": ("bart", BART, "encoder", False),
    "xlnet": (
        "xlnet",
        dict(d_model=32, n_layer=1, n_head=4, d_head=8, d_inner=32),
        "encoder",
        False,
    ),
}
FAST = ["mistral", "bloom"]  # a sliding window, ALiBi
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in SCORED if kind not in FAST]
FAST_REFUSED = ["mamba"]
SLOW_REFUSED = [
    pytest.param(kind, marks=pytest.mark.slow) for kind in REFUSED if kind not in FAST_REFUSED
]


def build(folder, model_type, change):
    """Save a random model of an architecture, whose context matters, with a tokenizer."""
    known = AutoConfig.for_model(model_type)
    sizes = SIZES | {"vocab_size": 400, "bos_token_id": 1}
    sizes = {key: value for key, value in sizes.items() if getattr(known, key, -1) != -1}
    config = AutoConfig.for_model(model_type, **sizes | change)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.15)
            else:
                nn.init.normal_(p, 1.0, 0.1)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Held-out text, questions and pairs, of lengths from below to above a window."""
    folder = tmp_path_factory.mktemp("evaluation")
    items = []
    for i in range(4):
        item = {"sample_id": f"{i}", "subject": "s", "question": TEXT[i][: 20 + 25 * i]}
        item |= {"option_a": "a", "option_b": "the river", "option_c": TEXT[0], "option_d": "dd"}
        items.append(item | {"answer": "ABCD"[i]})
    pairs = [{"id": i, "eng_Latn": TEXT[0][: 20 * i + 9], "npi_Deva": TEXT[2]} for i in range(4)]
    for side in ("en", "ne"):
        write_jsonl(folder / side / "heldout.jsonl", [{"text": text} for text in TEXT])
        write_jsonl(folder / side / "mmlu.test.jsonl", items)
        write_jsonl(folder / side / "mmlu.dev.jsonl", items)
    write_jsonl(folder / "ne/flores.dev.jsonl", pairs)
    write_jsonl(folder / "ne/flores.devtest.jsonl", pairs)
    return folder


def stage(main, argv, errors):
    """Run a stage in a process of its own. Return its exit code and its last line of stderr."""
    pid = forked(main, argv, limit_file_size(10**9, errors))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    lines = [line for line in errors.read_text().splitlines() if "error:" in line]
    return code, (lines or [""])[-1]


def train_argv(model, text, out, *more):
    argv = ["--model", model, "--data", text, "--out", out, "--steps", 3, "--batch-size", 2]
    argv += ["--micro-batch-size", 2, "--seq-len", 64, "--precision", "fp32", "--lr", 1e-2]
    return [*argv, "--device", "cpu", *more]


def evaluate_argv(model, evaluation, out, *more):
    argv = ["--model", model, "--lang", "ne", "--data-dir", evaluation, "--out", out, "--greedy"]
    argv += ["--device", "cpu", "--dtype", "float32", "--tasks", "bpb,mcq,mt,mmlu"]
    return [*argv, "--max-new-tokens", 6, "--num-samples", 3, "--num-questions", 3, *more]


def normalized_input(module, x):
    """Return x_hat of weight * x_hat + bias, or of (1 + weight) * x_hat: both are affine."""
    weight = module.weight.detach().clone()
    before = module.forward(x)
    module.weight.data = weight + 1
    after = module.forward(x)
    module.weight.data = weight
    return after - before


def reference_scores(folder, tokens):
    """Return Wanda's column scores in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    seen = {}  # what each weight multiplies

    def keep(module, args, output):
        x = args[0] if isinstance(module, nn.Linear) else normalized_input(module, args[0])
        seen.setdefault(module, []).append(x.flatten(0, -2))

    owners = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():
            continue
        own = dict(module.named_parameters(recurse=False))
        owners |= {f"{path}.{key}": (module, p.detach()) for key, p in own.items()}
        if "weight" in own:
            module.register_forward_hook(keep)
    with torch.no_grad():
        for row in tokens:
            model.base_model(input_ids=row[None], use_cache=False)
    scores = {}
    for name, (module, p) in owners.items():
        norm = math.sqrt(tokens.numel())
        if name.endswith(".weight"):
            norm = torch.cat(seen[module]).square().sum(0).sqrt()
        s = p.abs() * norm
        scores[name] = s.sum(0) if s.dim() == 2 else s
    return scores


def check_scores(folder, chats, out):
    argv = ["--model", folder, "--data", chats, "--num-samples", 4, "--seq-len", 64, "--out", out]
    code, line = stage(score.main, argv, out.with_suffix(".err"))
    assert code == 0, line
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = score.calibration_tokens(chats, tokenizer, 4, 64, 42)
    found, expected = load_file(out), reference_scores(folder, tokens)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max()
        assert error < 1e-4, (name, float(error))


def check_training(folder, text, mask, out):
    argv = train_argv(folder, text, out, "--mask", mask)
    code, line = stage(train.main, argv, out.with_suffix(".err"))
    assert code == 0, line
    before, after, masks = (
        load_file(path)
        for path in (folder / "model.safetensors", out / "model/model.safetensors", mask)
    )
    assert before.keys() == after.keys()
    moved = 0
    for name, keep in masks.items():
        if name not in before:  # a model may save a parameter under another name
            continue
        frozen = (keep == 0).expand(before[name].shape)
        assert torch.equal(before[name][frozen], after[name][frozen]), name
        moved += int((before[name] != after[name]).sum())
    assert moved > 1000


def check_evaluation(folder, evaluation, out):
    """Compare each saved number with that of a forward pass of its row alone."""
    argv = evaluate_argv(folder, evaluation, out)
    code, line = stage(evaluate.main, argv, out.with_suffix(".err"))
    assert code == 0, line
    lines = out.with_name(out.stem + ".items.jsonl").read_text().splitlines()
    found = {evaluate.key_of(saved): saved for saved in map(json.loads, lines[1:])}
    args = evaluate.parse_args(list(map(str, argv)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    args.context = 2**40 if model.config.model_type == "bloom" else 512
    args.files = []
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    stops = {2} | {i for i, text in enumerate(texts) if "\n" in text}
    for key, (_, prompt, parts) in evaluate.make_items(args, tokenizer).items():
        if parts:
            want = [reference_loglik(model, prompt, part) for part in parts]
            scores = found[key]["scores"]
            have = scores["loglik"] if "loglik" in scores else [-scores["nats"]]
            assert have == pytest.approx(want, abs=2e-3, rel=1e-4), (key, have, want)
            continue
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 6 and not stops & set(tokens[len(prompt) :]):
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
        text = tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
        assert found[key]["prediction"] == text.split("\n")[0].strip(), key
    return len(found)


@pytest.mark.parametrize("kind", [*FAST, *SLOW])
def test_scored_trained_and_evaluated(kind, chats, text, evaluation, tmp_path):
    folder = build(tmp_path / "model", *SCORED[kind])
    check_scores(folder, chats, tmp_path / "scores")
    argv = ["--scores", tmp_path / "scores", "--out", tmp_path / "mask"]
    assert stage(make_mask.main, argv, tmp_path / "mask.err")[0] == 0
    check_training(folder, text, tmp_path / "mask", tmp_path / "out")
    assert check_evaluation(folder, evaluation, tmp_path / "eval.json") >= 20


@pytest.mark.parametrize("kind", [*FAST_REFUSED, *SLOW_REFUSED])
def test_refused_by_name(kind, chats, text, evaluation, tmp_path):
    """By every stage, or, where only the columns are not those of nn.Linear, by score.py."""
    model_type, change, reason, trained = REFUSED[kind]
    folder = build(tmp_path / "model", model_type, change)
    errors = tmp_path / "err"
    argv = ["--model", folder, "--data", chats, "--seq-len", 64, "--out", tmp_path / "scores"]
    code, line = stage(score.main, argv, errors)
    assert code == 2 and reason in line and not (tmp_path / "scores").exists(), line
    if trained:
        code, line = stage(train.main, train_argv(folder, text, tmp_path / "out"), errors)
        assert code == 0 and (tmp_path / "out/model").exists(), line
        assert check_evaluation(folder, evaluation, tmp_path / "eval.json") >= 20
        return
    hft = ["--method", "hft", "--model", folder, "--out", tmp_path / "mask"]
    for main, argv in (
        (make_mask.main, hft),
        (train.main, train_argv(folder, text, tmp_path / "out")),
        (evaluate.main, evaluate_argv(folder, evaluation, tmp_path / "eval.json")),
    ):
        code, line = stage(main, argv, errors)
        assert code == 2 and reason in line and model_type in line, line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["err", "model"]
