import pytest

from qilin_med.config.corpus import CorpusSettings
from qilin_med.data.card import heavy_losses
from qilin_med.data.inspection import preview_source
from qilin_med.errors import UserError


def test_a_preview_shows_random_records_as_the_model_sees_them_or_what_would_help(
    write_lines, tmp_path, small_tokenizer, capsys
):
    small_tokenizer.save_pretrained(tmp_path / "model")
    good = write_lines(*({"question": f"咳嗽{n}天", "answer": "多喝水"} for n in range(50)), {"question": "发热"})
    odd = write_lines({"ask": "a", "info": {"reply": "b"}, "extra": [{"x": 1}]}, name="odd.jsonl")
    sources = [
        {"stage": "sft", "name": name, "kind": "chat", "paths": [str(path)], "licence": "-"}
        for name, path in (("good", good), ("odd", odd))
    ]
    settings = CorpusSettings(name="x", output_dir="x", tokenizer=str(tmp_path / "model"), sources=sources)
    outs = []
    for name in ("good", "sft/good", "odd"):
        preview_source(settings, name, 2)
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] and outs[0].count("---") == outs[0].count("多喝水</s>⟧") == 2
    assert (
        "1 of 1 files: 51 rows, 50 records" in outs[0]
        and "no record: 1 times: unknown layout: fields question" in outs[0]
    )
    assert 'columns {"question": "ask", "answer": "info.reply"} or rows "extra"' in outs[2]
    with pytest.raises(UserError, match=r"no source is named 'bad'.*sft/good, sft/odd"):
        preview_source(settings, "bad", 2)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_preview_ends_behind_a_whole_record(tmp_path, small_tokenizer, capsys, monkeypatch, encoding):
    monkeypatch.setattr("qilin_med.data.inspection.BEGINNING", 1000)
    small_tokenizer.save_pretrained(tmp_path / "model")
    cell = "咳嗽\n" * 40
    rows = "".join(f'题{n},"{cell}",多喝水\n' for n in range(50))
    (tmp_path / "rows.csv").write_text(f"title,ask,answer\n{rows}", encoding=encoding)
    source = {
        "stage": "sft",
        "name": "x",
        "kind": "department_qa",
        "paths": [str(tmp_path / "rows.csv")],
        "licence": "-",
    }
    preview_source(
        CorpusSettings(name="x", output_dir="x", tokenizer=str(tmp_path / "model"), sources=[source]), "x", 9
    )
    out = capsys.readouterr().out
    shown = out.count("多喝水</s>⟧")
    assert 1 < shown < 9 and f"{shown} rows, {shown} records" in out and "no record" not in out


def test_sources_that_lose_most_of_their_rows_are_named():
    def source(rows: int, skipped: int, kept: int, rejected: dict[str, int]) -> dict:
        shared = {
            "stage": "sft",
            "name": "x",
            "rows": rows,
            "records": rows - skipped,
            "kept": kept,
            "rejected": rejected,
        }
        return {**shared, "rows_skipped": {"no answer": skipped} if skipped else {}}

    assert heavy_losses([source(10, 5, 5, {}), source(10, 0, 1, {"not drawn": 9})]) == []
    assert heavy_losses([source(10, 6, 4, {}), source(10, 0, 4, {"too short": 6}), source(0, 0, 0, {})]) == [
        "sft/x: 4 records from 10 rows, 6 rows skipped and 0 records rejected, most for: no answer (6)",
        "sft/x: 4 records from 10 rows, 0 rows skipped and 6 records rejected, most for: too short (6)",
        "sft/x: 0 records from 0 rows, 0 rows skipped and 0 records rejected, most for: no rows (0)",
    ]
