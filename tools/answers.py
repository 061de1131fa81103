"""Ask a model many prompts in batches, and save every answer at once: for chat_eval.py, judged.py.

A run that was killed at any moment continues to the same answers: the batches and their seeds
follow from the prompts alone, and what is saved is not asked again.
"""

import argparse
import json
import os

import torch
from tqdm import tqdm

import evaluate


def read_done(path, header, fail):
    """Return the finished items, {(task, run, id): item}, of a run with the same header."""
    done = {}
    if not os.path.exists(path):
        return done
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.endswith("\n")]
    if lines[:1] != [json.dumps(header) + "\n"]:
        print(f"{path} is of other settings, data or model: starting again")
        return done
    for line in lines[1:]:
        try:
            item = json.loads(line)
            done[item["task"], item["run"], item["id"]] = item
        except (ValueError, KeyError, TypeError) as error:
            fail(f"{path} is damaged ({error}). Delete it to start again")
    return done


def resume(path, header, fail):
    """Return the finished items of a file, {key: item}, and a function that saves one more."""
    done = read_done(path, header, fail)
    lines = [json.dumps(header), *map(json.dumps, done.values())]
    evaluate.write_atomically(path, "\n".join(lines) + "\n")

    def save(item):
        key = item["task"], item["run"], item["id"]
        if key in done:  # of a batch that was saved in part
            return
        done[key] = item
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(item) + "\n")

    return done, save


def ask_all(loaded, task, run, asked, new_tokens, sampling, args, items, first=0):
    """Answer all prompts that are not answered yet.

    An answer ends where the model's context does: without room for one it is empty.

    loaded: model, tokenizer, the ids that end an answer, whether batches may be used, and the
    model's context. asked: {id: (ids of the prompt, what is saved with the answer)}. items: what
    `resume` returned. first: the number of the first batch, which seeds it.
    """
    model, tokenizer, ends, batched, context = loaded
    done, save = items

    def keep(name, ids, room):
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        stopped = bool(ids) and ids[-1] in ends
        answer = {"task": task, "run": run, "id": name, "stopped": stopped}
        if room < new_tokens:
            answer["room"] = room
        save(answer | asked[name][1] | {"output": text})

    todo = []
    for name, (prompt, _) in asked.items():
        if len(prompt) < context:
            todo.append(({"task": task, "side": "source", "run": run, "id": name}, prompt, []))
        else:
            keep(name, [], 0)
    limits = argparse.Namespace(max_new_tokens=new_tokens, batch_tokens=0)
    if batched:
        limits.batch_tokens = args.batch_tokens
    batches = evaluate.make_batches(todo, limits)
    for number, batch in tqdm(batches, desc=f"{task}, run {run}", unit="batch"):
        if all((task, run, item["id"]) in done for item, _, _ in batch):
            continue
        torch.manual_seed((args.seed + run) * 1_000_003 + first + number)
        prompts = [prompt for _, prompt, _ in batch]
        found, _ = evaluate.generate(model, prompts, new_tokens, ends, sampling)
        for (item, prompt, _), ids in zip(batch, found, strict=True):
            room = context - len(prompt)
            keep(item["id"], ids[:room], room)
