import json
import random
import zipfile
from collections import Counter

import pytest
from reading import chat, content, read, records, source

from qilin_med.config.corpus import RawSource
from qilin_med.config.experiment import KINDS
from qilin_med.data.read.readers import READERS, raw_files, read_raw
from qilin_med.errors import UserError
from qilin_med.records import Chat, Document, Preference, Question, Skipped


def test_every_kind_has_a_reader():
    assert set(READERS) == set(KINDS)


# ------------------------------------------------------------------------------------------------- rows of each kind


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("text", {"text": " 正文\n二 "}, " 正文\n二 "),
        ("text", {"text": ["一", "二"]}, "一\n二"),
        ("huatuo", {"questions": ["发热", "发烧"], "answers": ["喝水"], "label": "x"}, ("发热", "喝水")),
        ("huatuo", {"questions": [["发热", "发烧"], ["热"]], "answers": ["喝水", "喝水"]}, ("发热", "喝水")),
        ("huatuo", {"instruction": ["发热"], "input": "", "output": ["喝水"], "id": ""}, ("发热", "喝水")),
        ("huatuo", {"instruction": "发热", "input": "三天", "output": "喝水"}, ("发热\n三天", "喝水")),
        ("department_qa", {"title": "发热？", "ask": "三天了", "answer": "喝水"}, ("发热？\n三天了", "喝水")),
        ("department_qa", {"title": "发热？", "ask": "无", "answer": "喝水"}, ("发热？", "喝水")),
        ("department_qa", {"title": "发热？", "ask": "", "answer": "喝水"}, ("发热？", "喝水")),
        ("department_qa", {"title": "发热？", "ask": "孩子发热三天", "answer": "喝水"}, ("孩子发热三天", "喝水")),
        ("department_qa", {"title": "发热？", "ask": "发热", "answer": "喝水"}, ("发热？", "喝水")),
        ("chat", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ("a", "b")),
        ("chat", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ("a", "b")),
        ("chat", {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]}, ("d", "e", "a\nb", "c")),
        ("chat", {"conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]}, tuple("abcd")),
        ("chat", ["病人：a", "医生：b", "医生: c", "患者：d", "医生：e"], ("a", "b\nc", "d", "e")),
        ("chat", {"question": "a", "answer": "b"}, ("a", "b")),
        ("chat", {"input": "病人：a\\n医生：b\\n病人：c\\n医生：", "target": "d"}, tuple("abcd")),
        ("chat", {"input": "a：b", "output": "c"}, ("a：b", "c")),
        ("instruct_chat", {"input": ["a", "c"], "output": ["b", "d"]}, tuple("abcd")),
        ("instruct_chat", {"instruction": "a", "input": "", "output": "b"}, ("a", "b")),
        ("multiturn_chat", {"instruction": "Human:a\nAssistant:b\nHuman：c\nAssistant：", "input": "", "output": "d"},
         tuple("abcd")),
        ("multiturn_chat", {"instruction": " <user>: a <bot>: b <user>: c", "output": "d", "input": ""}, tuple("abcd")),
        ("multiturn_chat", {"instruction": "a", "input": "", "output": "b"}, ("a", "b")),
        ("multiturn_chat", {"instruction": "Human: a: Human: b\nc\nAssistant:", "output": "d"}, ("a: Human: b\nc", "d")),
        ("hc3", {"question": "a", "human_answers": ["b"], "chatgpt_answers": ["c", "d"]}, ("a", "c")),
        ("hc3", {"question": "a", "human_answers": ["", "b"], "chatgpt_answers": [" "]}, ("a", "b")),
        ("safety_prompts", {"prompt": "a", "response": "b", "type": "t"}, ("a", "b")),
        ("preference", {"question": "a", "response_chosen": "b", "response_rejected": "c"}, ("a", "b", "c")),
        ("preference", {"prompt": "a", "messages": [], "chosen": [{"role": "user", "content": "a"},
         {"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}, ("a", "b", "c")),
        ("zhongjing", {"instruction": "a", "input": "b", "output": ["c", "d"]}, ("a\nb", "c", "d")),
        ("zhongjing", {"query": "e", "history": "[['a', 'b']]", "rank1": "c", "rank2": "d", "rank3": "", "rank4": "c"},
         ("a", "b", "e", "c", "d")),
        ("zhongjing", {"query": "e", "history": "[]", "rank1": "c", "rank2": "x", "rank3": "d"}, ("e", "c", "d")),
    ],
)  # fmt: skip
def test_a_row_of_each_kind(write_lines, kind, row, expected):
    path = write_lines(row)
    [(rows, record)] = read(kind, path)
    assert (rows, record.id, content(record)) == (1, f"{path}:1", expected)


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("text", {"text": " "}, "empty text"),
        ("text", {"content": "a"}, "no field 'text'"),
        ("text", {"text": 3}, "wrong type"),
        ("huatuo", {"questions": [], "answers": ["a"]}, "empty question"),
        ("huatuo", {"questions": ["a"], "answers": []}, "empty answer"),
        ("huatuo", {"questions": ["a"], "answers": [{"x": 1}]}, "wrong type"),
        ("huatuo", {"ask": "a"}, "unknown layout"),
        ("department_qa", {"title": "a", "answer": "b"}, "unknown layout"),
        ("department_qa", {"title": "a", "ask": "无", "answer": " "}, "empty answer"),
        ("chat", {"ask": "a"}, "unknown layout"),
        ("chat", [], "no answer"),
        ("chat", ["病人：a"], "no answer"),
        ("chat", ["医生：a", "病人：b"], "roles out of order"),
        ("chat", ["a"], "no answer"),
        ("chat", {"conversation": [3]}, "wrong type"),
        ("chat", {"messages": [{"role": "tool", "content": "a"}]}, "unknown role"),
        ("chat", {"messages": [{"content": "a"}]}, "unknown role"),
        ("chat", {"question": "\ud83d", "answer": "a"}, "not Unicode"),
        ("chat", 7, "unknown layout"),
        ("instruct_chat", {"input": ["a", "b"], "output": ["c"]}, "not as many answers as questions"),
        ("instruct_chat", {"input": ["a"]}, "unknown layout"),
        ("multiturn_chat", {"instruction": "x\nHuman:a\nAssistant:", "output": "d"}, "text before the first turn"),
        ("multiturn_chat", {"instruction": "Human:a\nAssistant:b", "output": "d"}, "roles out of order"),
        ("multiturn_chat", {"instruction": "Human:a\nAssistant:", "output": ""}, "empty answer"),
        ("hc3", {"question": "a", "human_answers": [], "chatgpt_answers": []}, "empty answer"),
        ("hc3", {"question": "a", "text": "b"}, "unknown layout"),
        ("safety_prompts", {"prompt": "a"}, "unknown layout"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ("preference", {"prompt": "a", "chosen": "b"}, "unknown layout"),
        ("zhongjing", {"instruction": "a", "output": ["b"]}, "unknown layout"),
        ("zhongjing", {"query": "a", "history": "__import__('os')", "rank1": "b", "rank2": "c"}, "unreadable history"),
        ("zhongjing", {"query": "a", "history": "", "rank1": "b", "rank2": "b"}, "chosen and rejected are the same"),
        ("meddialog", ["医生：a"], "no answer"),
        ("meddialog", ["a"], "unknown layout"),
        ("meddialog", {"x": 1}, "unknown layout"),
        ("xywy_kg", {"desc": "a"}, "no name"),
        ("xywy_kg", {"name": "a", "symptom": [" "], "_id": {"$oid": "1"}}, "nothing but a name"),
        ("39health_kg", {"name": "a", "part": "b", "rate": "收费标准不一致"}, "shifted cells"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(tmp_path, kind, row, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    [(rows, record)] = read(kind, path)
    assert (rows, record.id, record.reason) == (1, f"{path}:1", reason)
    assert json.loads(record.raw) == row


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_raises_and_none_vanishes(tmp_path, kind):
    """Every field with every odd value, alone and beside well-formed ones."""
    odd = [None, 3, 1.5, True, "", "x", "\ud83d", [], [[]], ["a"], [["a", "b"]], [{"a": 1}], {}, {"a": []}, [None, 2]]
    names = [name for name in READERS[kind].fields if len(name) > 1] or ["x"]
    rows = [*odd, *({name: value} for name in names for value in odd)]
    rows += [{**dict.fromkeys(names, other), name: value} for name in names for value in odd for other in ("b", ["b"])]
    path = tmp_path / ("rows.txt" if kind == "cpubmed_kg" else "rows.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, "[" * 5000]))
    found = sum(count for count, _ in read(kind, path))
    # Of a category of safety prompts each value is a row.
    assert found == len(rows) + 1 or (kind == "safety_prompts" and found > len(rows))


def test_several_answers_are_several_chats_of_one_row(write_lines):
    path = write_lines({"questions": ["a", "b"], "answers": ["c", "d", "c"]}, {"questions": ["e"], "answers": ["f"]})
    assert read("huatuo", path) == [
        (1, Chat(f"{path}:1", chat("a", "c"))),
        (0, Chat(f"{path}:1~2", chat("a", "d"))),
        (1, Chat(f"{path}:2", chat("e", "f"))),
    ]


def test_columns_rename_and_unknown_fields_are_refused(write_lines):
    path = write_lines({"question": "a", "raw_anwser": "b"})
    assert records("chat", path, answer="raw_anwser") == [Chat(f"{path}:1", chat("a", "b"))]
    with pytest.raises(UserError, match=r"columns maps 'reply'.*kind hc3.*question, human_answers, chatgpt_answers"):
        raw_files(source("hc3", path, reply="x"))


def test_safety_prompts_are_keyed_by_category_or_a_list(tmp_path):
    rows = [{"prompt": str(n), "response": f"答{n}", "type": "t"} for n in range(5)]
    for indent in (None, 1):
        path = tmp_path / f"{indent}.json"
        keyed = {"Insult": rows[:2], "a.b": rows[2:4], "Empty": [], "note": "x", "one": rows[4]}
        path.write_text(json.dumps(keyed, indent=indent))
        *before, empty, note, last = read("safety_prompts", path)
        places = ("#0~1", "#0~2", "#1~1", "#1~2")
        assert before == [(1, Chat(f"{path}{place}", chat(str(n), f"答{n}"))) for n, place in enumerate(places)]
        assert empty == (1, Skipped(f"{path}#2", "no record", '{"Empty": []}'))
        assert note == (1, Skipped(f"{path}#3", "unknown layout", "x"))
        assert last == (1, Chat(f"{path}#4", chat("4", "答4")))
    (tmp_path / "list.json").write_text(json.dumps(rows))
    assert len(records("safety_prompts", tmp_path / "list.json")) == 5


# ----------------------------------------------------------------------------------------------------------- text


def test_lines_are_joined_until_a_document_is_long_enough(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("一二三\r\n\r\n四五六七\n八九十百千万\n  \n亿".encode("gb18030"))
    joined = RawSource(name="x", kind="text", paths=[str(path)], stage="pretraining", licence="x", join_lines=6)
    assert list(read_raw(joined, path)) == [
        (2, Document(f"{path}:1", "一二三\n四五六七")),
        (1, Document(f"{path}:4", "八九十百千万")),
        (1, Document(f"{path}:6", "亿")),
    ]
    assert [rows for rows, _ in read("text", path)] == [1] * 4


# ---------------------------------------------------------------------------------------------------------- exams

AB = (("A", "一"), ("B", "二"))


@pytest.mark.parametrize(
    ("row", "options", "answer"),
    [
        ({"Options": "A 一\nB 二", "Answer": "B"}, AB, "B"),
        ({"Options": "A 一\\nB 二", "Answer": "ba"}, AB, "AB"),
        ({"Options": "Ａ．一\r\nＢ、二\n", "Answer": "Ｂ，Ａ"}, AB, "AB"),
        ({"Options": "A：一\n\nB: 二", "Answer": "A、B"}, AB, "AB"),
        ({"Options": "A p53 Ⅱ\nB C反应蛋白\nA级", "Answer": "A"}, (("A", "p53 Ⅱ"), ("B", "C反应蛋白\nA级")), "A"),
        ({"choices": ["一", "二"], "answer": ["b"]}, AB, "B"),
        ({"choices": {"b": "二", "a": "一"}, "answer": "A B"}, AB, "AB"),
        ({"A": "一", "B": "二", "C": "", "answer": "A"}, AB, "A"),
        ({"A": "0", "B": 2, "answer": "A"}, (("A", "0"), ("B", "2")), "A"),
        ({"opa": "一", "opb": "二", "answer": "opb"}, AB, "B"),
        ({"option_a": "一", "option_b": "二", "answer": "一"}, AB, "A"),
        ({"options": {"1": "一", "2": "二"}, "answer": "2"}, AB, "B"),
        ({"options": ["A. 一", "B、二"], "answer": ["二", "A"]}, AB, "AB"),
        ({"options": [{"key": "A", "value": "一"}, {"key": "B", "value": "二"}], "answer": "B"}, AB, "B"),
        ({"options": [{"A": "一"}, {"B": "二"}], "answer": "B"}, AB, "B"),
        ({"options": [["A", "一"], ["B", "二"]], "answer": "二"}, AB, "B"),
        ({"options": "A.一 B.二", "answer": "B"}, AB, "B"),
        ({"options": "A.一B.二", "answer": "B"}, AB, "B"),
        ({"options": "一\n二", "answer": "二"}, AB, "B"),
        ({"options": ["一", "二"], "answer": 0}, AB, "A"),
        ({"options": ["一", "二"], "answer": "2"}, AB, "B"),
        ({"options": ["2", "3"], "answer": "3"}, (("A", "2"), ("B", "3")), "B"),
        ({"options": ["B", "AB"], "answer": "B"}, (("A", "B"), ("B", "AB")), "B"),
    ],
)
def test_options_and_answers_in_every_layout(write_lines, row, options, answer):
    path = write_lines({"Question": " 题 ", **row})
    assert read("exam", path) == [(1, Question(f"{path}:1", "题", options, answer))]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"Question": " "}, "no stem"),
        ({"Question": "nan"}, "no stem"),
        ({"Options": ""}, "no options"),
        ({"Options": None}, "no options"),
        ({"Options": []}, "no options"),
        ({"Options": "一\nB 二"}, "options without letters"),
        ({"Options": "A 一\nA 二"}, "an option letter is given twice"),
        ({"Options": "A 一\nB \nC 三"}, "empty option"),
        ({"Options": "A 一\nB"}, "empty option"),
        ({"Options": ["一", ""]}, "empty option"),
        ({"Options": {"A": "", "B": "二"}}, "empty option"),
        ({"Answer": "AC"}, "answer is not among the options"),
        ({"Answer": "甲"}, "answer is no letter"),
        ({"Answer": ""}, "no answer"),
        ({"Answer": "nan"}, "no answer"),
        ({"Answer": 1}, "answer is a number, counted from 0 or from 1"),
        ({"Answer": {"x": 1}}, "unknown layout"),
        ({"Options": "A.一B.二C.B、三"}, "options cannot be told apart"),
        ({"Options": ["A", "AB"], "Answer": "AB"}, "answer is letters, and the text of another option"),
        ({"Options": 3, "x": 1}, "no options"),
    ],
)
def test_questions_that_cannot_be_used(write_lines, row, reason):
    good = {"Question": "题", "Options": "A 一\nB 二", "Answer": "A"}
    path = write_lines(good, {**good, **row})
    (_, question), (rows, record) = read("exam", path)
    assert isinstance(question, Question) and (rows, record.id, record.reason) == (1, f"{path}:2", reason)


@pytest.mark.parametrize("written", [int, float, "{}.0".format])
def test_answers_by_number_count_from_where_the_file_shows(write_lines, written):
    def write(answers):
        return write_lines(*({"question": "题", "options": ["一", "二", "三"], "answer": written(n)} for n in answers))

    for answers, letters in (([2, 0, 1], "CAB"), ([1, 3, 2], "ACB")):
        path = write(answers)
        assert "".join(record.answer for record in records("exam", path)) == letters
    for answers in ([1, 2], [0, 3]):
        path = write(answers)
        assert {record.reason for record in records("exam", path)} == {"answer is a number, counted from 0 or from 1"}
        told = records("exam", path, answer="letter(answer, `0`)", stage="question")
        assert told[0].answer == "ABC"[answers[0]] and told[0].facets == (("stage", "题"),)


def test_cmexam_tables_tell_facets_and_explanations(tmp_path):
    head = "Question,Options,Answer,Explanation,Disease Group,Clinical Department,Difficulty level\r\n"
    path = tmp_path / "train.csv"
    path.write_bytes(b"\xef\xbb\xbf" + (head + r"题\n干,A 一\nB 二,B,因\n为,nan,儿科,3").encode())
    facets = (("Clinical Department", "儿科"), ("Difficulty level", "3"))
    assert records("exam", path) == [Question(f"{path}:2", "题\n干", AB, "B", "因\n为", facets)]


@pytest.mark.parametrize("head", ["id,question,A,B", "id,question,A,B,answer"])
def test_a_file_that_tells_no_answers_keeps_its_questions(tmp_path, head):
    rows = ["0,$\\nu$ 题,一,二", "1,题,一,二"]
    end = "," if "answer" in head else ""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("test/x.csv", "\n".join([head, *(row + end for row in rows)]))
        archive.writestr("val/x.csv", "id,question,A,B,answer\n0,题,一,二,A\n1,题,一,二,\n")
    place = f"{tmp_path}/a.zip!"
    first, second, told, untold = records("exam", tmp_path)
    assert first == Question(f"{place}test/x.csv:2", "$\\nu$ 题", AB, "")
    assert (second.answer, told) == ("", Question(f"{place}val/x.csv:2", "题", AB, "A"))
    assert (untold.id, untold.reason) == (f"{place}val/x.csv:3", "no answer")


# ---------------------------------------------------------------------------------------------------------- graphs


def test_triples_become_a_passage_for_each_head(tmp_path):
    path = tmp_path / "graph.tsv"
    path.write_text("肺炎@@疾病\t症状\t发热@@症状\n肺炎@@疾病\t病因\t细菌@@其他\n肺炎@@疾病\t症状\t咳嗽@@症状\n感冒\t症状\t发热\n"
                    "肺炎@@疾病\t症状\t发热@@症状\n")  # fmt: skip
    found = {record.id[len(str(path)) :]: (rows, record.text) for rows, record in read("cpubmed_kg", path)}
    rows, text = found.pop(":1")
    first, second, end = text.split("。")
    assert rows == 4 and text.count("肺炎（疾病）") == 1 and text.count("肺炎") == 2 and end == ""
    assert "症状" in first and "发热、咳嗽" in first and "病因" in second and "细菌" in second
    rows, text = found.pop(":4")
    assert rows == 1 and all(word in text for word in ("感冒", "症状", "发热")) and not found


def test_grouping_needs_no_order_and_wordings_vary(tmp_path):
    triples = [(f"病{n % 97}", f"关系{n % 3}", f"尾{n}") for n in range(2000)]
    lines_ = [f"{head}@@疾病\t{relation}\t{tail}@@症状" for head, relation, tail in triples] + ["坏\t行"]
    texts = []
    for seed in (None, 5):
        if seed:
            random.Random(seed).shuffle(lines_)
        path = tmp_path / f"{seed}.tsv"
        path.write_text("\n".join(lines_))
        pairs = read("cpubmed_kg", path)
        assert sum(rows for rows, _ in pairs) == 2001 and len(pairs) == 98
        documents = [record for _, record in pairs if isinstance(record, Document)]
        assert {int(document.id.rsplit(":")[1]) for document in documents} == first_lines(lines_)
        texts.append(documents)
    # The order of the triples decides that of a passage's sentences, not what it says.
    assert Counter("".join(sorted(d.text)) for d in texts[0]) == Counter("".join(sorted(d.text)) for d in texts[1])
    frames = {d.text.split("。")[0].split("（")[1].split("尾")[0] for d in texts[0] if d.text.startswith("病")}
    assert len(frames) > 3


def first_lines(rows: list[str]) -> set[int]:
    first = {}
    for number, line in enumerate(rows, 1):
        if "@@" in line:
            first.setdefault(line.split("@@")[0], number)
    return set(first.values())


@pytest.mark.parametrize(
    ("lines_", "columns", "expected"),
    [
        (["head\thead_type\trelation\ttail\ttail_type", "a\t疾病\tr\tb\tx", "a\t疾病\tr\tb"],
         {}, [(1, "not as many cells as columns"), (1, "a（疾病）")]),
        (["t\th\tr", "b\ta\tr1"], {"head": "h", "relation": "r", "tail": "t"}, [(1, "a")]),
        (["a\t其他\tr\tb\tx"], {}, [(1, "a")]),
        (["a@@疾病\tr", "@@疾病\tr\tb", "a\t\tb", "a@@疾病\tr\t@@x", "", "a\tr\tb"], {},
         [(1, "not three or five columns"), *[(1, "empty head, relation or tail")] * 3, (1, "a")]),
    ],
)  # fmt: skip
def test_layouts_of_triples_and_broken_lines(tmp_path, lines_, columns, expected):
    path = tmp_path / "graph.txt"
    path.write_text("\n".join(lines_))
    found = read("cpubmed_kg", path, **columns)
    assert [rows for rows, _ in found] == [rows for rows, _ in expected]
    for (_, record), (_, told) in zip(found, expected, strict=True):
        assert told in record.text if isinstance(record, Document) else record.reason == told


def test_xywy_diseases_tell_every_field(tmp_path):
    row = {"_id": {"$oid": "1"}, "name": "百日咳", "desc": "急性传染病。\r\n\r\n 多见于儿童。", "category": ["疾病百科", "儿科"],
           "prevent": "隔离。", "cause": "细菌。\n二", "symptom": ["咳嗽", " ", "低热"], "yibao_status": "否", "get_prob": "0.5%",
           "easy_get": "小儿", "get_way": "呼吸道传播", "acompany": ["肺不张"], "cure_department": ["内科"],
           "cure_way": ["药物治疗"], "cure_lasttime": "1月", "cured_prob": "98%", "common_drug": ["药甲"], "cost_money": "千元",
           "check": ["血常规"], "do_eat": ["南瓜"], "not_eat": ["海虾"], "recommand_eat": ["蛋羹"], "recommand_drug": [],
           "drug_detail": ["药乙(药乙)"]}  # fmt: skip
    path = tmp_path / "medical.json"
    path.write_bytes((json.dumps(row, ensure_ascii=False) + "\r\n").encode() * 2)
    first, second = records("xywy_kg", path)
    assert (first.id, second.id, first.text) == (f"{path}:1", f"{path}:2", second.text)
    told = ["百日咳：急性传染病。\n多见于儿童", "儿科", "隔离", "细菌。\n二", "咳嗽、低热", "：否", "0.5%", "小儿",
            "呼吸道传播", "肺不张", "内科", "药物治疗", "1月", "98%", "药甲", "千元", "血常规", "南瓜", "海虾", "蛋羹",
            "药乙(药乙)"]  # fmt: skip
    assert all(text in first.text for text in told)
    # One sentence for each field; the drugs that none recommends have none.
    assert (first.text.count("百日咳"), "推荐的药物" in first.text, "。。" in first.text) == (21, False, False)


def test_39health_cells_lose_the_marks_of_cut_pages(tmp_path):
    head = "name,alias,part,drug,symptom,treatment,rate,money,,"
    cells = ["肺炎", '"肺热，lung fever,肺感染 肺病"', "肺 气管", "药甲... 药甲... 药乙 [详细]", "咳嗽 发热... [详细"]
    row = ",".join([*cells, "应该如何用药？用什么药？ [详细]", "暂无相关资料", "", "", ""])
    path = tmp_path / "disease.csv"
    path.write_bytes(f"{head}\n{row}\n发热,,,,,,,,,错\n".encode("gb18030"))
    document, spilled = records("39health_kg", path)
    for told in ("肺热、lung fever、肺感染、肺病", "肺、气管", "药甲、药乙", "咳嗽、发热"):
        assert told in document.text
    assert document.text.count("肺炎") == 4 and not any(
        mark in document.text for mark in ("...", "详细", "暂无", "如何用药")
    )
    assert spilled.reason == "more cells than columns"


# ------------------------------------------------------------------------------------------------------- dialogues

BLOCKS = """
id=1
https://x

Doctor faculty
某院

Description
疾病： 肺炎
病情描述： 咳嗽
三天
希望获得的帮助： 吃药吗
过敏史： 无（2020-03-23填写）

Dialogue
医生：
您好
医生：
几天了？
病人：
三天
既往病史： 无（2020-03-23填写）
医生：休息
两天
病人：
谢谢

Diagnosis and suggestions
总结：多休息

id=2
Description
疾病： 感冒

id = 3
Description
病情描述： 头痛

Dialogue
病人： 医生好，头痛
病人：怎么办
医生： 休息

Description
病情描述： 又痛了

Dialogue
医生：
复诊

id=4
Dialogue
病人：
在吗

id=5
Dialogue
医生：
您好
"""


def test_text_blocks_become_dialogues_from_patient_to_doctor(tmp_path):
    path = tmp_path / "dialogues.txt"
    path.write_text(BLOCKS)
    told = "疾病：肺炎\n病情描述：咳嗽\n三天\n希望获得的帮助：吃药吗"
    assert [(rows, record.id.rsplit(":")[1], content(record)) for rows, record in read("meddialog", path)] == [
        (1, "2", (told, "您好\n几天了？", "三天", "休息\n两天")),
        (1, "31", "no dialogue"),
        (1, "35", ("医生好，头痛\n怎么办", "休息", "病情描述：又痛了", "复诊")),
        (1, "51", "no answer"),
        (1, "56", "no answer"),
    ]


def test_text_that_is_no_block_is_skipped(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("前言\n二\nid=1\nDialogue\n病人：a\n医生：b\nid=2\nDialogue\n无名\n病人：a\n医生：b")
    assert [content(record) for record in records("meddialog", path)] == [
        "unknown layout",
        ("a", "b"),
        "unknown layout",
    ]


def test_lists_of_turns_become_dialogues(tmp_path):
    path = tmp_path / "dialogues.json"
    path.write_text(json.dumps([["医生：喂", "病人：a", "病人：b", "医生：c", "病人：d"],
                                {"description": "疾病：肺炎", "dialogue": ["医生：c"]}]))  # fmt: skip
    assert records("meddialog", path) == [
        Chat(f"{path}#0", chat("a\nb", "c")),
        Chat(f"{path}#1", chat("疾病：肺炎", "c")),
    ]


def test_ranked_tables_quote_line_breaks(tmp_path):
    path = tmp_path / "ranks.tsv"
    head = "id\tquery\thistory\trank1\trank2\trank3\trank4"
    path.write_text(f"{head}\n0\t\"问\n二\"\t[('a', 'b')]\t好\t中\t\t\n1\t问\t[\t好\t中\t差\t\n")
    good, bad = records("zhongjing", path)
    assert good == Preference(f"{path}:2", chat("a", "b", "问\n二"), "好", "中")
    assert (bad.id, bad.reason) == (f"{path}:4", "unreadable history")
