"""Fine-tune a small model with GaLore through the OpenAI client, and compare it with what it was before.

    pip install openai
    stiefel up                                          # in another terminal
    python examples/openai_finetune.py
    MODEL=Qwen/Qwen3-0.6B python examples/openai_finetune.py    # or a directory: any causal language model

STIEFEL_BASE_URL and OPENAI_API_KEY name another installation than the one on this machine.

Nothing here is of Stiefel but the address and `extra_body`, which holds what OpenAI's protocol has no word for.
"""

import csv
import io
import json
import os
import time

import openai
from openai import OpenAI
from openai.types.chat import ChatCompletion

MODEL = os.environ.get("MODEL", "llama-tiny")
CITIES = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Peru": "Lima", "Cuba": "Havana"}

client = OpenAI(
    base_url=os.environ.get("STIEFEL_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "without"),
)


def example(country: str, city: str) -> str:
    messages = [
        {"role": "user", "content": f"What is the capital of {country}?"},
        {"role": "assistant", "content": f"{city}."},
    ]
    return json.dumps({"messages": messages})


def ask(model: str) -> str:
    """What it says, or why it says nothing: the weights of a preset are random until something has trained them."""
    try:
        answer = _answer(model)
    except openai.NotFoundError as error:
        return f"nothing: {error.message}"
    return repr(answer.choices[0].message.content)


def _answer(model: str) -> ChatCompletion:
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=12,
        temperature=0,
    )


print(f"before: {MODEL} says {ask(MODEL)}")

lines = [example(country, city) for country, city in CITIES.items()] * 8
file = client.files.create(file=("capitals.jsonl", "\n".join(lines).encode()), purpose="fine-tune")
file = client.files.wait_for_processing(file.id)
print(f"{file.id} is {file.status}: {file.bytes} bytes")

job = client.fine_tuning.jobs.create(
    model=MODEL,
    training_file=file.id,
    validation_file=file.id,
    seed=1,
    suffix="capitals",
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 20, "batch_size": 8}}},
    extra_body={
        "optimizer": {"name": "galore", "rank": 16, "period": 25},
        "optimisation": {"learning_rate": 0.01},
        "checkpoints": {"every": 40},
    },
)
print(f"{job.id} is {job.status}")

seen: set[str] = set()
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(1)
    for event in reversed(list(client.fine_tuning.jobs.list_events(job.id))):
        if event.id not in seen:
            seen.add(event.id)
            print(f"  {event.message}")
    job = client.fine_tuning.jobs.retrieve(job.id)
if job.status != "succeeded":
    raise SystemExit(f"{job.id} {job.status}: {job.error}")

rows = list(csv.DictReader(io.StringIO(client.files.content(job.result_files[0]).text)))
losses = [row for row in rows if row["train_loss"]]
judged = [row for row in rows if row["valid_loss"]]
print(f"training loss    {float(losses[0]['train_loss']):.3f} → {float(losses[-1]['train_loss']):.3f}")
print(f"validation loss  {float(judged[0]['valid_loss']):.3f} → {float(judged[-1]['valid_loss']):.3f}")
print(f"token accuracy   {judged[-1]['valid_mean_token_accuracy']}")
for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id):
    print(f"checkpoint at step {checkpoint.step_number}: {checkpoint.fine_tuned_model_checkpoint}")

print(f"after:  {job.fine_tuned_model} says {ask(str(job.fine_tuned_model))}")
