import random
import time

import pytest

from qilin_med.config.corpus import CleaningSettings
from qilin_med.config.experiment import DataSource
from qilin_med.data.clean import Cleaner
from qilin_med.data.read.readers import read_chats, read_preferences
from qilin_med.data.render import text_of
from qilin_med.records import Chat, Document, Message, Preference, Question, Skipped

LONG = "发热三天，伴咳嗽、咽痛，应当先量体温再决定是否用药。"


def cleaner(**settings) -> Cleaner:
    return Cleaner(CleaningSettings(**settings))


def cleaned(text: str, **settings) -> tuple[str, tuple[str, ...]]:
    record, rules = cleaner(**settings).clean(Document("1", text))
    return record.text, rules


def chat(*contents: str, system: str = "") -> Chat:
    messages = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return Chat("1", (*([Message("system", system)] if system else []), *messages))


def pair(chosen: str, rejected: str, question: str = "发热怎么办") -> Preference:
    return Preference("1", (Message("user", question),), chosen, rejected)


def question(*options: str, answer: str = "A", stem: str = "甘味的作用特点是") -> Question:
    return Question("1", stem, tuple(zip("ABCDE", options, strict=False)), answer)


# ---------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("rule", "text", "mended"),
    [
        ("Unicode NFC", "Sjo\u0308gren综合征", "Sjögren综合征"),
        ("invisible characters", "\ufeff头\u200b痛\u00ad\x07，\u200d恶心\ue077", "头痛，恶心"),
        ("white space", "一 \n二", "一\n二"),
        ("white space", "一\n\n\n二", "一\n\n二"),
        ("white space", " 头痛", "头痛"),
        ("white space", "一\r\n二\u2028三", "一\n二\n三"),
        ("white space", "　　头痛　三天\xa0左右 \t\n\n\n\n　　咳嗽 \n", "头痛 三天 左右\n\n咳嗽"),
        ("HTML", "<p>发热</p><br/>咳嗽<b>两周</b>", "发热\n\n咳嗽两周"),
        ("HTML", '<a href="http://x.cn/a?b=1" target=_blank>血常规</a><!-- 广告 --><script>f(1)</script>', "血常规"),
        ("HTML", "血小板100×10<sup>9</sup>/L，H<sub>2</sub>O", "血小板100×10^9/L，H2O"),
        ("HTML", "比值&lt;1，3&#39;端，A&amp;B，&amp;gt;5", "比值<1，3'端，A&B，>5"),
        ("HTML", "&" + 9 * "amp;" + "lt;1", "<1"),
        ("HTML", "来了&65533;", "来了\ufffd"),
        ("link to more", "脑电图 头颅平片... [详细]", "脑电图 头颅平片"),
        ("cut off by dots", "无力，口苦，口干...", "无力，口苦，口干"),
        ("cut off by dots", "去了很多医院……", "去了很多医院"),
        ("phone number", "请拨13800138000咨询", "请拨〔电话〕咨询"),
        ("phone number", "+86 13800138000、0086-13800138000，138-0013-8000", "〔电话〕、〔电话〕，〔电话〕"),
        ("phone number", "13800138000/13900139000", "〔电话〕/〔电话〕"),
        ("phone number", "010-62345678，(0571)87654321转801", "〔电话〕，〔电话〕"),
        ("phone number", "0571-87654321-801，（010）62345678", "〔电话〕，〔电话〕"),
        ("phone number", "电话：87654321，手机号是138 0013 8000", "电话：〔电话〕，手机号是〔电话〕"),
        ("full-width numbers", "电话１３８００１３８０００", "电话〔电话〕"),
        ("identity number", "身份证11010519491231002X。", "身份证〔证件号〕。"),
        ("identity number", "身份证号：110105491231002", "身份证号：〔证件号〕"),
        ("e-mail address", "写信到zhang.san@hospital.com.cn即可", "写信到〔邮箱〕即可"),
        ("QQ number", "加QQ：12345678，或扣扣87654321", "加QQ：〔QQ〕，或扣扣〔QQ〕"),
        ("WeChat number", "加微信号lisi_ok", "加微信号〔微信〕"),
        ("WeChat number", "微信号 zhangsan，微信：li_4321，WeChat:87654321", "微信号 〔微信〕，微信：〔微信〕，WeChat:〔微信〕"),
    ],
)  # fmt: skip
def test_every_rule_mends_what_it_is_for(rule, text, mended):
    assert cleaned(text)[0] == mended
    assert rule in cleaned(text)[1]
    assert cleaned(mended) == (mended, ())


@pytest.mark.parametrize(
    "text",
    [
        # numbers that are no contact data
        "每次500mg，每日3次，P<0.05，pH<7.35，BP160/100mmHg，t1/2为13.8h",
        "ICD-10编码J45.901，2023-01-15复诊，2020年1月12日 10:30:00",
        "青霉素13800000000单位，约13800138000元，13812345678拷贝以上的1.13812345678",
        "条码9913800138000，编号X13800138000，13800138000123，138001380001",
        "货号AB-13812345678，13812345678-9，全球13800000000",
        "doi:10.3760/cma.j.cn112137-20200508-00162，10.1159/000515554",
        "身份证110105194912310021，流水号110105194912310021，110105491231002",  # wrong check digit; no word
        "2010-62345678，010-12345678，1010-62345678-3，020-6234567.5",
        "QQ群，QQ2023，QQ 10000人在线，IQQ 12345678，微信8.0.16，微信支付100000元，微信：Android，VX-680",
        "电话2小时后回复，手机20000000像素以上的20000000元，hotel 23456789",
        "usleep(15000000)；user@example.com；git@github.com:a/b.git；三@四",
        "http://x.cn/a/13800138000.html?id=13900139000",
        # signs that are no remains of a page
        "a<b且c>d，若a<b>c，肿块<5mm，vector<string> x，<user>你好</user>，<b && c>",
        "AT&T，A&B;C，&copyfoo;，R&D",
        "用HTML写：<p>发热</p>&nbsp;即可",
        "这里的 `<br>` 表示换行",
        "```\n<p>一</p>\n```",
        "<p>标签表示段落",
        "| 价格 | 一<br>二 |\n| 服务 | 三 |",
        "<div>\n  <p>一</p>\n</div>",
        "[1] 张三。[详细说明]见下……其余从略",
        # white space and characters with a meaning
        "def f(x):\n    if x:\n\treturn 1",
        "头痛 恶心 呕吐\n\n腹泻",
        "👨\u200d👩\u200d👧和①②③、℃、Ⅱ、α、µg、①",
        "全角，（）！？：；ＡＢＣ１２３％",
        "頭痛發熱",
    ],
)
def test_what_only_looks_alike_stays(text):
    assert cleaned(text) == (text, ())


@pytest.mark.parametrize(
    ("setting", "rule", "text", "mended"),
    [
        ("full_width_to_half", "full-width characters", "ＣＴ值３．５％，（ａ＋ｂ）：好！", "CT值3.5%，（a+b）：好！"),
        ("traditional_to_simplified", "traditional characters", "頭髮脫落，發熱", "头发脱落，发热"),
    ],
)
def test_conversions_only_on_demand(setting, rule, text, mended):
    assert cleaned(text) == (text, ())
    assert cleaned(text, **{setting: True}) == (mended, (rule,))


def test_masking_can_be_switched_off():
    text = "电话１３８００１３８０００，QQ：12345678，微信号 zhangsan，a@b.cn，11010519491231002X"
    assert cleaned(text, mask_personal_data=False) == (text, ())


def test_rules_make_no_work_for_the_next_run():
    text = "&amp;lt;br&amp;gt;头\u200b痛<<b>b>&nb\u200bsp;e\u200b\u0301 &#8203;\n\n \n\n咳… "
    once = cleaned(text)[0]
    assert cleaned(once) == (once, ())


def test_every_text_of_a_record_is_cleaned_and_nothing_else():
    messy, clean = "头\u200b痛 ", "头痛"
    records = {
        chat(messy, messy, system="\ufeff"): chat(clean, clean),
        chat(messy, messy, system=messy): chat(clean, clean, system=clean),
        pair(messy, messy + "吗", messy): pair(clean, messy[:-1].replace("\u200b", "") + " 吗", clean),
        Question("1", messy, (("A", messy),), "A", messy, (("科", messy),)): Question(
            "1", clean, (("A", clean),), "A", clean, (("科", messy),)
        ),
    }
    for record, expected in records.items():
        assert cleaner().clean(record) == (expected, ("invisible characters", "white space"))
    # The dots that end an answer may be meant.
    assert cleaner().clean(chat("续写：从前……", "有座山...")) == (chat("续写：从前……", "有座山..."), ())


# ----------------------------------------------------------------------------------------------------- rejections

STRICT = {"max_characters": 100, "min_answer_characters": 2}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Document("1", "第四节麻疹"), "too short"),
        (Document("1", ""), "too short"),
        (Document("1", "热" * 101), "too long"),
        (Document("1", LONG + "\ufffd"), "replacement characters (U+FFFD)"),
        (Document("1", "----- =====  *** 发热"), "mostly symbols"),
        (Document("1", "Пример заявки на программу 发热"), "wrong language"),
        (Document("1", "多喝水，多休息。\n" * 3), "repeated lines"),
        (Document("1", "Drink water now. " * 3), "repeated lines"),
        (chat("发热怎么办", "多喝水。多喝水！多喝水"), "repeated lines"),
        (chat("发热怎么办", "嗯"), "answer too short"),
        (chat("发热怎么办", "请看：https://x.cn/a?b=1"), "answer is only a link"),
        (chat("发热怎么办", "www.example.com"), "answer is only a link"),
        (chat("", "多喝水"), "empty question"),
        (chat("发热怎么办", "多喝水", "还有呢", ""), "empty answer"),
        (pair("多喝水", "水"), "answer too short"),
        (pair("", "多喝水"), "empty answer"),
        (pair("多喝水", "多喝水"), "chosen and rejected are the same"),
        (pair("多喝水", "休息", ""), "empty question"),
        (question("能补", "能泄", stem=""), "empty question"),
        (question(), "no options"),
        (question("能补", ""), "empty option"),
        (question("能补", "能补"), "doubled options"),
        (question("能补", "能泄", answer="AC"), "answer is not among the options"),
    ],
)
def test_every_reason(record, reason):
    assert cleaner(**STRICT).reject_reason(record) == reason


@pytest.mark.parametrize(
    "record",
    [
        Document("1", LONG),
        Document("1", "WBC 13.8×10^9/L，CT、MRI（-），P<0.05"),
        Document("1", "CT scan and blood test are normal, please rest at home."),
        Document("1", "1. 一\n2. 二\n" * 2 + LONG),
        chat("咳", "休息"),
        chat("发热怎么办", "多久了？", "三天", "嗯", "谢谢", "不客气"),
        chat("发热怎么办", "可以看 https://x.cn/a 上的说明。"),
        chat("计算 3x + 5 = 11", "x = (11 - 5) / 3 = 2"),
        pair("多喝水，多休息。", "水。水。水。水。"),  # a rejected answer may be poor
        pair("多喝水", "多休息"),
        question("能补", "能泄", answer=""),
        question("能补", "能泄", answer="AB"),
    ],
)
def test_good_records_stay(record):
    assert cleaner(**STRICT).reject_reason(record) is None


@pytest.mark.parametrize(
    ("languages", "reasons"), [(["zh"], (None, "wrong language")), (["en"], ("wrong language", None))]
)
def test_languages_are_chosen(languages, reasons):
    texts = LONG, "Please rest at home and drink water, 发热."
    assert tuple(cleaner(languages=languages).reject_reason(Document("1", text)) for text in texts) == reasons


@pytest.mark.parametrize(
    ("loose", "record"),
    [
        ({"min_characters": 5}, Document("1", "第四节麻疹")),
        ({"max_characters": 101}, Document("1", "热" * 101)),
        ({"min_answer_characters": 1}, chat("发热怎么办", "嗯")),
        ({"max_symbol_share": 1.0}, Document("1", "----- =====  *** 发热")),
        ({"max_repeated_share": 0.7}, Document("1", "多喝水，多休息。\n" * 3)),
    ],
)
def test_limits_are_settings(loose, record):
    assert cleaner(**STRICT).reject_reason(record) and cleaner(**{**STRICT, **loose}).reject_reason(record) is None


# --------------------------------------------------------------------------------------------------------- corpora


@pytest.mark.parametrize(
    "unit", ["<", "<!--", "<b ", "&amp;", " ", "\n ", "1", "1-", "(0", "a.", "a@", "微信", ".", "…"]
)
def test_no_text_takes_long(unit):
    start = time.process_time()
    record, _ = cleaner().clean(Document("1", f"好{unit * 20_000}好"))
    cleaner().reject_reason(record)
    assert time.process_time() - start < 2


def test_cleaning_real_texts_twice_changes_nothing_more(shared):
    data = shared / "data"
    chats = [data / "huatuo26m/huatuo26M_test.json", *sorted((data / "sft_general").glob("*1*"))]
    readers = ((read_chats, chats), (read_preferences, [data / "preference/dpo_zh_500.jsonl"]))
    records = [
        record
        for read, files in readers
        for record in read([DataSource(path=str(file)) for file in files])
        if not isinstance(record, Skipped)
    ]
    lines = (data / "kg_39health/disease.csv").read_text(encoding="gb18030").splitlines()
    records += [Document("1", line) for line in lines if line.strip()]
    clean = cleaner(full_width_to_half=True)
    for record in random.Random(0).sample(records, 4000):
        once, _ = clean.clean(record)
        assert clean.clean(once) == (once, ()), text_of(once)[:200]
