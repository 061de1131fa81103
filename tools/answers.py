"""Ask a model many prompts in batches, and save every answer at once: for chat_eval.py, judged.py.

A run that was killed at any moment continues to the same answers: the batches and their seeds
follow from the prompts alone, and what is saved is not asked again.
"""

import argparse

import torch
from tqdm import tqdm

import evaluate
from data import evaluation


def key_of(item):
    """Return what tells an item from all others."""
    return item["task"], item["run"], item["id"]


def resume(path, header):
    """Return the finished items of a file, {key: item}, and a function that saves one more."""
    done = evaluation.resume(path, header, key_of)

    def save(item):
        if key_of(item) in done:  # of a batch that was saved in part
            return
        done[key_of(item)] = item
        evaluation.append(path, [item])

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
