"""What every stage refuses alike, in one line: damaged models and text, and other kinds of them.

And what no stage may be stopped by.
"""

import gzip
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time

import multiprocess
import pytest
from conftest import ROOT, TEMPLATE, TEXT, forked, write_jsonl
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_architectures import evaluate_argv, evaluation, train_argv  # noqa: F401
from test_train import stop_after_saving
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import evaluate
import make_mask
import score
import train
from data import blocks, instruct, models
from data.identity import digest_of
from data.rows import parse, read_rows
from variants import files


def some_fast(kinds, number):
    """Return parameters of which the first `number` are tried by the fast tests."""
    slow = [pytest.param(*as_tuple(kind), marks=pytest.mark.slow) for kind in list(kinds)[number:]]
    return [pytest.param(*as_tuple(kind)) for kind in list(kinds)[:number]] + slow


def as_tuple(kind):
    return kind if isinstance(kind, tuple) else (kind,)


def commands(model, chats, text, evaluation, out):  # noqa: F811
    """Return {stage: (main, argv)} of all stages that read a model."""
    scores = ["--model", model, "--data", chats, "--num-samples", 2, "--seq-len", 32]
    return {
        "score": (score.main, [*scores, "--out", out / "scores"]),
        "make_mask": (
            make_mask.main,
            ["--method", "hft", "--model", model, "--out", out / "mask"],
        ),
        "train": (train.main, train_argv(model, text, out / "out")),
        "evaluate": (evaluate.main, evaluate_argv(model, evaluation, out / "eval.json")),
    }


def changed(model, folder, **change):
    """Return a copy of a model whose config.json has other values."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CONFIGS = {
    "quantized": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
    "encoder-decoder": ({"model_type": "t5"}, "t5 has an encoder"),
    "images": ({"model_type": "gemma3"}, "gemma3 also reads images"),
    "wrong type": ({"rms_norm_eps": "a"}, "expected float, got str"),
    "out of range": ({"pad_token_id": 9999}, "Padding_idx"),
    "unknown": ({"hidden_act": "nope"}, "nope"),
    "no number": ({"dtype": "nope"}, "nope"),
    "zero": ({"num_attention_heads": 0}, "zero"),
    "no positions": ({"max_position_embeddings": -1}, "allows -1 positions"),
    "few rows": ({"vocab_size": 300}, "400 tokens, but 300 embeddings"),
    "list": ({"quantization_config": 5}, "cannot be read"),
}


@pytest.mark.parametrize("kind", some_fast(CONFIGS, 4))
def test_bad_configs_end_every_stage(kind, olmo2, chats, text, evaluation, tmp_path, refused):  # noqa: F811
    change, message = CONFIGS[kind]
    model = changed(olmo2, tmp_path / "model", **change)
    for main, argv in commands(model, chats, text, evaluation, tmp_path).values():
        assert message in refused(main, *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


FILES = {
    ("tokenizer.json", '{"model": {"type": "Z"}, "added_tokens": []}'): "its tokenizer cannot be",
    ("config.json", "["): "not a valid JSON file",
    ("config.json", "[1]"): "Unrecognized model",
    ("tokenizer.json", "{"): "its tokenizer cannot be read",
    ("tokenizer.json", "{}"): "its tokenizer cannot be read",
    ("tokenizer_config.json", "[]"): "its tokenizer cannot be read",
}


@pytest.mark.parametrize("file,content", some_fast(FILES, 2))
def test_damaged_files_end_every_stage(
    file,
    content,
    olmo2,
    chats,
    text,
    evaluation,
    tmp_path,
    refused,  # noqa: F811
):
    model = changed(olmo2, tmp_path / "model")
    (model / file).write_text(content)
    for main, argv in commands(model, chats, text, evaluation, tmp_path).values():
        assert FILES[file, content] in refused(main, *argv)


def test_an_adapter_beside_merged_weights_is_refused(
    llama,
    chats,
    text,
    evaluation,
    tmp_path,
    refused,  # noqa: F811
):
    """transformers would add it to them a second time."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(r=2))
    model.save_pretrained(shutil.copytree(llama, tmp_path / "model"))
    found = commands(tmp_path / "model", chats, text, evaluation, tmp_path)
    for name in ("score", "train", "evaluate"):
        main, argv = found[name]
        assert "adapter_config.json adds an adapter" in refused(main, *argv)


def test_tensors_that_are_not_used_are_named(olmo2, evaluation, tmp_path, capsys):  # noqa: F811
    """config.json may have fewer layers by a mistake."""
    model = changed(olmo2, tmp_path / "model", num_hidden_layers=1, layer_types=None)
    evaluate.main([str(a) for a in evaluate_argv(model, evaluation, tmp_path / "eval.json")])
    unused = [name for name in load_file(olmo2 / "model.safetensors") if ".layers.1." in name]
    line = f"{len(unused)} tensors of its files are not used: {min(unused)}, ..."
    assert line in capsys.readouterr().out and unused


def test_directories_in_the_place_of_files(olmo2, text, tmp_path, refused):
    argv = [*train_argv(olmo2, text, tmp_path / "out"), "--mask", tmp_path]
    assert "is a directory" in refused(train.main, *argv)
    argv = ["--scores", tmp_path, "--out", tmp_path / "mask"]
    assert "is a directory" in refused(make_mask.main, *argv)


def test_all_may_read_what_all_may_list(olmo2, chats, text, tmp_path):
    """safetensors lets its owner alone read a file."""
    before = os.umask(0o022)
    scores, mask, out = tmp_path / "scores", tmp_path / "mask", tmp_path / "out"
    score.main(["--model", str(olmo2), "--method", "magnitude", "--out", str(scores)])
    make_mask.main(["--scores", str(scores), "--out", str(mask)])
    train.main([str(a) for a in (*train_argv(olmo2, text, out), "--mask", mask)])
    os.umask(before)
    for path in (scores, mask, *(out / "model").iterdir()):
        assert path.stat().st_mode & 0o777 == 0o644, path


def test_the_folder_of_a_run_is_not_its_model(olmo2, chats, text, evaluation, tmp_path, refused):  # noqa: F811
    shutil.copytree(olmo2, tmp_path / "run/model")
    for main, argv in commands(tmp_path / "run", chats, text, evaluation, tmp_path).values():
        assert "no directory with a config.json" in refused(main, *argv)
    main, argv = commands(olmo2 / "config.json", chats, text, evaluation, tmp_path)["score"]
    assert "no directory with a config.json" in refused(main, *argv)


def test_a_tokenizer_that_does_not_know_the_script_ends_every_stage(
    olmo2,
    chats,
    text,
    evaluation,
    tmp_path,
    refused,  # noqa: F811
):
    model = changed(olmo2, tmp_path / "model")
    words = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<unk>": 3, "the": 4}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    found = commands(model, chats, text, evaluation, tmp_path)
    for name in ("score", "train", "evaluate"):
        main, argv = found[name]
        assert "% of the tokens are <unk>" in refused(main, *argv)


def test_the_end_of_text_is_not_unknown_where_one_token_is_both(olmo2):
    tokenizer = AutoTokenizer.from_pretrained(olmo2, unk_token="<|endoftext|>", pad_token="!")
    models.check_unknown(tokenizer, 50, 100, "text", files.fail)


LANGUAGES = {
    '{"sw": {"name": "Swahili"},}': "double quotes",
    '{"sw": {"flores": "x"}}': "sw has no name",
    '{"sw": {"name": "Swahili", "prompts": {"mt": "{sentence}"}}}': "sw has a prompt mt, which is",
    '{"sw": {"name": "Swahili", "prompts": {"sum": "Fupisha:"}}}': "has fields none, but needs",
    '{"sw": {"name": "Swahili", "prompts": {"sum": "{txt}"}}}': "has fields txt, but needs text",
    '{"sw": {"name": "Swahili", "prompts": {"sum": "{text: }"}}}': "Space not allowed",
    '{"sw": {"name": "Swahili", "prompts": {"sum": "{text"}}}': "expected '}'",
    '{"sw": {"name": "Swahili", "prompts": ["{text}"]}}': "no attribute",
}


@pytest.mark.parametrize("content", LANGUAGES)
def test_mistakes_in_languages_json_are_one_line(content, tmp_path, capsys):
    shutil.copy(ROOT / "data/rows.py", tmp_path)
    english = (ROOT / "data/languages.json").read_text().split(' "ne": {')[0].rstrip()
    (tmp_path / "languages.json").write_text(english + content.removeprefix("{"))
    with pytest.raises(SystemExit) as error:
        runpy.run_path(tmp_path / "rows.py")
    (line,) = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and "languages.json cannot be read: " in line
    assert LANGUAGES[content] in line


def test_the_end_of_text_of_gemma_is_not_a_tag():
    words = {"</s>": 0, "<eos>": 1, "<end_of_turn>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words)), eos_token="<end_of_turn>"
    )
    assert models.end_of_text(tokenizer, files.fail) == ("<eos>", 1)


def test_a_token_that_stands_in_no_text_needs_no_embedding(olmo2, text, tmp_path, refused):
    """As that for images in Gemma 3 1B. A token of the chat template needs one."""
    model = changed(olmo2, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    tokenizer.add_tokens(AddedToken("<image>", special=True))
    tokenizer.save_pretrained(model)
    assert len(models.load_skeleton(model, files.fail)[1]) == 401
    tokenizer.chat_template += "<image>"
    tokenizer.save_pretrained(model)
    argv = train_argv(model, text, tmp_path / "out")
    assert "401 tokens, but 400" in refused(train.main, *argv)


def test_a_tokenizer_without_end_of_text_ends_every_stage(
    olmo2,
    chats,
    text,
    evaluation,
    tmp_path,
    refused,  # noqa: F811
):
    model = changed(olmo2, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (model / name).read_text()
        (model / name).write_text(content.replace("<|endoftext|>", "<|other|>"))
    found = commands(model, text, text, evaluation, tmp_path)
    missing = {"score": "end-of-text", "train": "end-of-text", "evaluate": "BOS and no EOS"}
    for name, what in missing.items():
        main, argv = found[name]
        assert f"no {what} token" in refused(main, *argv)


GENERATION = [
    {"num_return_sequences": 4},
    {"stop_strings": ["a"]},
    {"penalty_alpha": 0.6},
    {"dola_layers": "high"},
    {"num_beams": "x"},
    [1],
]
TEMPLATES = ["{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[0]['content'] + 1 }}"]


@pytest.mark.parametrize("number", some_fast(range(6), 1))
def test_nothing_stands_between_a_trained_model_and_its_folder(number, olmo2, text, tmp_path):
    """Neither a generation_config.json that no model takes nor a chat template that fails."""
    model = changed(olmo2, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps(GENERATION[number]))
    (model / "chat_template.jinja").write_text(TEMPLATES[number % 3])
    train.main([str(a) for a in train_argv(model, text, tmp_path / "out")])
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out/model" / name).read_bytes() == (model / name).read_bytes()


def test_a_model_without_generation_config_stays_without(olmo2, text, tmp_path):
    model = changed(olmo2, tmp_path / "model")
    (model / "generation_config.json").unlink()
    train.main([str(a) for a in train_argv(model, text, tmp_path / "out")])
    names = {path.name for path in (tmp_path / "out/model").iterdir()}
    assert names == {path.name for path in model.iterdir()} | {"README.md"}


def test_a_template_that_writes_nothing(olmo2, evaluation, tmp_path, refused):  # noqa: F811
    model = changed(olmo2, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{# nothing #}")
    argv = evaluate_argv(model, evaluation, tmp_path / "eval.json")
    assert "writes nothing" in refused(evaluate.main, *argv)


LINES = {
    gzip.compress(b'{"text": "a"}\n', mtime=0): "it is compressed",
    '{"text": "a"}\n'.encode("utf-16"): "UTF-16",
    b'{\n "text": "a"\n}\n': "an object of several lines",
    b'[{"text": "a"},\n{"text": "b"}]\n': "a JSON array",
    b'[{"text": "a"}]': "a JSON array",
    b"text\tlabel\na\t1\n": "tab-separated",
    '{"text": "a"}\n'.encode("utf-16-be"): "UTF-16",
    '{"text": "a"}\n'.encode("utf-32"): "UTF-32",
}


@pytest.mark.parametrize("content", some_fast(LINES, 4))
def test_other_formats_are_named_by_every_reader(
    content,
    olmo2,
    chats,
    text,
    evaluation,
    tmp_path,
    refused,  # noqa: F811
):
    data = tmp_path / "data.jsonl"
    data.write_bytes(content)
    folder = shutil.copytree(evaluation, tmp_path / "evaluation")
    (folder / "ne/heldout.jsonl").write_bytes(content)
    for main, argv in (
        commands(olmo2, data, text, evaluation, tmp_path)["score"],
        commands(olmo2, chats, data, evaluation, tmp_path)["train"],
        commands(olmo2, chats, text, folder, tmp_path)["evaluate"],
    ):
        line = refused(main, *argv)
        assert LINES[content] in line and "damaged" not in line
    with pytest.raises(ValueError, match=LINES[content]):
        parse(content.split(b"\n")[0])


def test_a_byte_order_mark_is_not_text(olmo2, tmp_path):
    """Neither that of a file nor one at the start of a text."""
    rows = [{"text": TEXT[i % 5] + str(i)} for i in range(40)]
    plain = write_jsonl(tmp_path / "plain.jsonl", rows)
    marked = write_jsonl(tmp_path / "m.jsonl", [{"text": "\ufeff" + row["text"]} for row in rows])
    marked.write_bytes(b"\xef\xbb\xbf" + marked.read_bytes())
    found = {}
    for name, path in (("plain", plain), ("marked", marked)):
        out = tmp_path / name
        argv = ["--model", olmo2, "--data", path, "--num-samples", 2, "--seq-len", 32]
        score.main([str(a) for a in [*argv, "--out", tmp_path / "scores"]])
        train.main([str(a) for a in train_argv(olmo2, path, out)])
        weights = (out / "model/model.safetensors").read_bytes()
        found[name] = (digest_of(load_file(tmp_path / "scores")), weights)
    assert found["plain"] == found["marked"]


def test_chats_of_parts_are_refused_as_held_out_text(olmo2, text, tmp_path, refused):
    """A template would write the list as Python does."""
    parts = [{"type": "text", "text": "a"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}]
    held_out = write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat}])
    argv = [*train_argv(olmo2, text, tmp_path / "out"), "--source-eval", held_out]
    assert "row 1 has no usable" in refused(train.main, *argv)


def test_chats_without_a_template_that_takes_them_are_refused(
    olmo2, chats, text, tmp_path, refused
):
    """None, and several of which none is the default: a ValueError, which is not one of JSON."""
    model = shutil.copytree(olmo2, tmp_path / "none")
    (model / "chat_template.jinja").unlink()
    argv = ["--model", model, "--data", chats, "--num-samples", 2, "--seq-len", 32]
    message = "no chat template for `messages`"
    assert message in refused(score.main, *argv, "--out", tmp_path / "scores")
    tokenizer = AutoTokenizer.from_pretrained(olmo2)
    tokenizer.chat_template = {"a": TEMPLATE, "b": TEMPLATE}
    tokenizer.save_pretrained(model)
    argv = [*train_argv(model, text, tmp_path / "out"), "--source-eval", chats]
    line = refused(train.main, *argv)
    assert "row 1 has no usable" in line and "multiple chat templates" in line


def test_ctrl_c_and_a_killed_process_while_tokenizing(capsys):
    """As `datasets` raises them: it waits for its processes before it lets Ctrl-C through."""
    with pytest.raises(KeyboardInterrupt), blocks.ended_processes():
        try:
            raise KeyboardInterrupt
        finally:
            raise multiprocess.TimeoutError
    for error, what in (
        (multiprocess.TimeoutError(), "one of its processes was killed"),
        (RuntimeError("One of the subprocesses has died"), "One of the subprocesses has died"),
    ):
        with pytest.raises(SystemExit), blocks.ended_processes():
            raise error
        assert f"tokenizing failed: {what}. Check the memory" in capsys.readouterr().err


def test_lines_of_a_compressed_text(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8") as file:
        file.write("[a]\n\n{b\n")
    assert list(read_rows(str(tmp_path / "a.txt.gz"))) == [{"text": "[a]"}, {"text": "{b"}]


def test_what_is_no_file_is_no_part_of_a_model(olmo2, tmp_path):
    model = shutil.copytree(olmo2, tmp_path / "model")
    found = instruct.find_model(model)
    (model / "dangling.json").symlink_to(tmp_path / "nowhere")
    (model / "folder.json").mkdir()
    assert instruct.find_model(model) == found


NUMBERS = {
    "heldout": {"text": 5},
    "mmlu.test": {"question": 5, "option_a": 1, "option_b": 2, "option_c": 3, "option_d": 4},
    "mmlu.dev": {"subject": 3},
}


def test_numbers_in_evaluation_sets_are_text(olmo2, evaluation, tmp_path):  # noqa: F811
    folder = shutil.copytree(evaluation, tmp_path / "evaluation")
    for name, numbers in NUMBERS.items():
        for side in ("en", "ne"):
            path = folder / f"{side}/{name}.jsonl"
            rows = [json.loads(line) | numbers for line in path.read_text().splitlines()]
            for i, row in enumerate(rows):
                row.update(subject=3, domain=["a"], text=f"{row.get('text')}" if i else 5)
            write_jsonl(path, rows)
    evaluate.main([str(a) for a in evaluate_argv(olmo2, folder, tmp_path / "eval.json")])


def test_a_damaged_log_does_not_stop_a_sound_checkpoint(olmo2, text, tmp_path):
    out = tmp_path / "out"
    argv = [str(a) for a in [*train_argv(olmo2, text, out), "--save-every", 1]]
    train.main(argv)
    whole = (out / "model/model.safetensors").read_bytes()
    shutil.rmtree(out / "model")
    (out / "train.jsonl").unlink()
    pid = forked(train.main, argv, stop_after_saving)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    (out / "train.jsonl").write_bytes(b"\xff\xfe damaged\n")
    train.main([*argv, "--resume"])
    assert (out / "model/model.safetensors").read_bytes() == whole


STAGES = ["train.py", "score.py", "make_mask.py", "evaluate.py"]


@pytest.mark.parametrize("script", some_fast(STAGES, 1))
def test_ctrl_c_while_torch_is_imported_is_one_line(script):
    command = [sys.executable, script, "--help"]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    stage = subprocess.Popen(command, **pipes)
    time.sleep(0.3)  # Python has started, and torch takes longer
    stage.send_signal(signal.SIGINT)
    assert stage.communicate()[1] == f"{script}: interrupted\n" and stage.returncode == 130
