"""Entries of configs/sources, each read over a made-up file in the shape of its data set."""

import json
from pathlib import Path

import pytest
from reading import content

from qilin_med.config.corpus import RawSource
from qilin_med.data.read.readers import raw_files, read_raw
from qilin_med.records import Question

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = {path.stem: json.loads(path.read_text()) for path in (ROOT / "configs/sources").glob("*.json")}
CASES = ("病人，男，40岁，发热三天。\n", "病人，女，30岁，头痛。\n")

EXPECTED = {
    "medqa": [
        ("甲病首选的检查是（　　）。", "触诊 听诊 叩诊 视诊 嗅诊", "B", "", {"meta_info": "第一部分　病史采集"}),
        ("下列何者最適合乙病？", "休息 飲水 散步 讀書", "B", "", {"meta_info": "taiwanese_test_Q"}),
    ],
    "cmb_exam": [
        ("甲病的表现不包括", "发热 咳嗽 头痛 飞行", "D", "", {"question_type": "单项选择题"}),
        ("乙病可用", "甲药 乙药 丙药 丁药", "AC", "", {"question_type": "多项选择题"}),
    ],
    "cmb_clin": [
        (f"{CASES[0]}诊断是什么？", "甲病。"), (f"{CASES[0]}如何治疗？", "休息。"), (f"{CASES[1]}诊断是什么？", "乙病。"),
    ],
    "cmmlu": [
        ("甲药每日用几次？", "一次 两次 三次 四次", "C", "", {}), ("乙病的表现，最常见的是", "发热 咳嗽 头痛 乏力", "A", "", {}),
    ],
    "explaincpe": [
        ("甲药的禁忌是", "发热 妊娠 咳嗽", "B", "甲药会伤及胎儿。", {}),
        ("乙药属于", "抗生素 维生素 激素", "B", "乙药即维生素甲。", {}),
    ],
    "cnmle": [("1.甲病最有效的治疗是（）。", "休息 饮水 甲药 乙药", "C", "甲药专治甲病。", {})],
    "cmtmedqa": [("发热怎么办？", "多喝水。", "还要吃药吗？", "不用。"), ("咳嗽怎么办？", "休息。")],
    "huatuogpt2_sft": [("甲病怎么办？", "休息。\n多喝水。", "要多久？", "三天。")],
    "huatuogpt_sft_226k": [("头痛怎么办？", "早睡。"), "no answer"],
    "xywy_nested": [
        ["甲病是一种虚构的病。", "内科", "7--14天", "否", "无特定人群", "发热、乏力", "南瓜", "海虾", "原因不明。", "常洗手。"],
    ],
    "chatmed_consult": [("发热要紧吗？", "先量体温。")],
    "shennong_tcm": [("气虚怎么调养？", "早睡早起。")],
    "huatuo26m": [
        ("甲病的病因是什么？", "原因不明。"), ("甲病的治疗方式", "休息；饮水"), ("甲病的治疗方式", "甲药"),
        ("头晕怎么回事？", "可能是疲劳。"),
    ],
    "cmedqa2": [("孩子发热，怎么办？", "多喝水。")],
    "webmedqa": [("发热怎么办", "多喝水"), "no record", ("扭伤怎么办", "冷敷")],
    "disc_med_sft": [("咳嗽三天了", "有痰吗？", "没有", "多喝水。")],
    "bianque": [("头痛", "几天了？", "两天", "睡眠如何？")],
    "medicalgpt": ["甲病是一种虚构的病。", ("扭伤怎么办？", "冷敷。"), ("头痛怎么办？", "早睡。", "不知道。")],
    "cmekg": [
        ["甲病（疾病）", "临床表现", "发热", "药物治疗", "甲药"], ["乙病", "临床表现", "头痛"],
        "丙病的第一段。", "丙病的第二段。",
    ],
    "huatuo_encyclopedia_qa": [("丁病要紧吗？", "不要紧。")],
    "zhongjing_rlhf": [("失眠怎么办？", "早睡，少喝咖啡。", "不知道。")],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted({*EXPECTED, *ENTRIES}))
def test_a_published_layout_is_read_by_its_entry_alone(name):
    folder = ROOT / "tests/fixtures" / name
    found = []
    for entry in ENTRIES[name]:
        paths = [path.replace("data/raw", str(folder)) for path in entry["paths"]]
        source = RawSource(**{**entry, "paths": paths})
        found += [record for file in raw_files(source) for _, record in read_raw(source, file)]
    assert len(found) == len(EXPECTED[name])
    for record, expected in zip(found, EXPECTED[name], strict=True):
        if isinstance(record, Question):
            stem, options, answer, explanation, facets = expected
            assert (record.stem, record.answer, record.explanation) == (stem, answer, explanation)
            assert record.options == tuple(zip("ABCDE", options.split(), strict=False))
            assert facets.items() <= dict(record.facets).items()
        elif isinstance(expected, list):  # a passage, whose wording a hash chooses
            assert all(text in record.text for text in expected)
        else:
            assert content(record) == expected
