"""The data: which tokens, in which order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from tests.distributed.case import spec
from trainer.config import TrainingSpec
from trainer.data import Sequences
from trainer.datasetconfig import DatasetSpec
from trainer.documents import documents
from trainer.errors import DataError, SpecError
from trainer.files import stdlib_files
from trainer.preflight import check_length, preflight
from trainer.prepare import prepare
from trainer.rundir import RunDir
from trainer.tokenizer import byte_tokenizer


def sequences(directory: Path, rank: int, **changes: object) -> Sequences:
    wanted = spec(directory, **changes)
    tokenise(wanted, directory)
    return Sequences(wanted, directory / "data", rank, torch.device("cpu"))


def tokenise(wanted: TrainingSpec, directory: Path) -> None:
    assert prepare(wanted, RunDir(directory), 0, lambda _: None, lambda: False)


def global_batch(directory: Path, processes: int, micro: int, step: int) -> set[tuple[int, ...]]:
    changes = {"resources": {"processes": processes}, "optimisation": {"micro_batch": micro, "global_batch": 8}}
    batches = [b for r in range(processes) for b in sequences(directory, r, **changes).micro_batches(step)]
    rows = torch.cat([batch.tokens for batch in batches])
    assert rows.shape == (8, 32)
    return {tuple(row.tolist()) for row in rows}


@pytest.mark.parametrize(("processes", "micro"), [(1, 2), (2, 4), (2, 1), (4, 2)])
def test_a_step_s_sequences_do_not_depend_on_ranks_or_accumulation(tmp_path: Path, processes: int, micro: int) -> None:
    for step in (0, 3, 1000):
        assert global_batch(tmp_path, processes, micro, step) == global_batch(tmp_path, 1, 8, step)


def test_an_epoch_visits_every_training_sequence_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    found = sequences(tmp_path, 0, resources={"processes": 1}, optimisation={"global_batch": 1})
    epochs = [
        [tuple(found.micro_batches(e * found.training + i)[0].tokens[0].tolist()) for i in range(found.training)]
        for e in range(2)
    ]
    assert len(set(epochs[0])) == found.training
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


def test_held_out_sequences_are_never_trained_on(tmp_path: Path) -> None:
    found = sequences(tmp_path, 0, resources={"processes": 1}, optimisation={"global_batch": 1})
    trained = {tuple(found.micro_batches(i)[0].tokens[0].tolist()) for i in range(found.training)}
    held_out = {tuple(row.tolist()) for rows in found.validation_batches() for row in found.load(rows)}
    assert held_out
    assert not trained & held_out


def test_the_fast_bytes_are_the_tokeniser_s_own(tmp_path: Path) -> None:
    text = "def f():\n\treturn 'naïve π 😀'  # \x00\x7f\r\n"
    (tmp_path / "text.txt").write_bytes(text.encode())
    wanted = spec(tmp_path, dataset={"sequence_length": 4, "validation_fraction": 0})
    tokenizer = byte_tokenizer()
    tokenise(wanted, tmp_path)
    stored = np.fromfile(tmp_path / "data" / "tokens.bin", dtype=np.uint16).tolist()
    assert stored == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_hugging_face_tokeniser_from_a_directory(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>").save_pretrained(
        tmp_path / "tok"
    )
    (tmp_path / "text.txt").write_text("a b c a " * 4)
    wanted = spec(tmp_path, tokenizer=str(tmp_path / "tok"), dataset={"sequence_length": 4, "validation_fraction": 0})
    tokenise(wanted, tmp_path)
    assert np.fromfile(tmp_path / "data" / "tokens.bin", dtype=np.uint16).tolist() == [1, 2, 0, 1] * 4 + [3]


def read(**dataset: object) -> list[str]:
    return list(documents(TypeAdapter(DatasetSpec).validate_python(dataset)))


def test_jsonl_documents_and_errors_that_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "one"}\n\n{"body": "two"}\n')
    assert read(source="jsonl", files=[str(tmp_path / "*.jsonl")], field="body") == ["one", "two"]
    with pytest.raises(DataError, match=r"a.jsonl, line 1 has no text under 'text'; it has \['body'\]"):
        read(source="jsonl", files=[str(file)])
    file.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(DataError, match="a.jsonl, line 2 is not JSON"):
        read(source="jsonl", files=[str(file)])


def test_text_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match="latin.txt is not UTF-8 at byte 2"):
        read(source="text", files=[str(tmp_path / "latin.txt")])


def test_a_hub_dataset_is_loaded_through_the_datasets_library(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"content": "one"}\n{"content": "two"}\n{"content": "three"}\n')
    found = read(source="hub", name=str(tmp_path), field="content", documents=2)
    assert found == ["one", "two"]
    with pytest.raises(DataError, match="dataset.name: .*cannot be loaded"):
        read(source="hub", name=str(tmp_path / "nowhere"))


def test_the_standard_library_is_real_text_in_a_fixed_order() -> None:
    files = stdlib_files()
    assert len(files) > 300
    assert files == stdlib_files()
    assert [f.name for f in files[:50]] != sorted(f.name for f in files[:50])
    assert not any("site-packages" in file.parts for file in files)


def test_a_dataset_that_is_too_short_is_told_before_and_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("short")
    wanted = spec(tmp_path, dataset={"sequence_length": 32})
    with pytest.raises(DataError, match="dataset.sequence_length: .* need 64"):
        preflight(wanted)
    with pytest.raises(DataError, match="dataset.sequence_length: .* need 64"):
        tokenise(wanted, tmp_path)
    assert not (tmp_path / "data" / "meta.json").exists()


@pytest.mark.parametrize(
    ("tokens", "fraction", "expected"), [(64, 0.01, (1, 1)), (6400, 0.1, (180, 20)), (32, 0, (1, 0))]
)
def test_the_split(tmp_path: Path, tokens: int, fraction: float, expected: tuple[int, int]) -> None:
    assert check_length(tokens, spec(tmp_path, dataset={"validation_fraction": fraction})) == expected


def test_another_dataset_in_the_same_run_directory_is_refused(tmp_path: Path) -> None:
    tokenise(spec(tmp_path), tmp_path)
    tokenise(spec(tmp_path, dataset={"sequence_length": 16}), tmp_path)  # only cut in another way
    other = spec(
        tmp_path, dataset={"source": "text", "files": [str(tmp_path / "text.txt"), str(tmp_path / "text.txt")]}
    )
    with pytest.raises(SpecError, match="dataset: .* was made from"):
        tokenise(other, tmp_path)


def test_a_stop_while_tokenising_is_obeyed_by_all_ranks_alike(tmp_path: Path) -> None:
    wanted = spec(tmp_path)
    assert not prepare(wanted, RunDir(tmp_path), 0, lambda _: None, lambda: True)
    assert not prepare(wanted, RunDir(tmp_path), 1, lambda _: None, lambda: False)
    tokenise(wanted, tmp_path)
    assert prepare(wanted, RunDir(tmp_path), 1, lambda _: None, lambda: True)


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(DataError, match="a.jsonl, line 2 holds half of a surrogate pair"):
        read(source="jsonl", files=[str(file)])


@pytest.mark.parametrize("kind", ["gzip", "bz2", "lzma", "zip"])
def test_packed_files_are_refused_unopened(tmp_path: Path, kind: str) -> None:
    """A bomb: 10 kB that would be 10 MB."""
    import importlib
    import zipfile

    packed = tmp_path / "packed.jsonl"
    if kind == "zip":
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jsonl", b"0" * 10_000_000)
    else:
        packed.write_bytes(importlib.import_module(kind).compress(b"0" * 10_000_000))
    for source in ("text", "jsonl"):
        dataset: DatasetSpec = TypeAdapter(DatasetSpec).validate_python({"source": source, "files": [str(packed)]})
        with pytest.raises(DataError, match=r"is packed \(.*\); unpack it first"):
            list(documents(dataset))
