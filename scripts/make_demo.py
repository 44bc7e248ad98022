"""Make the demo: an invented world (data/demo) and a small base model that knows the world but not its medicine.

Three steps, each left out when its result is already there: the text, an untrained model (models/demo-init), and the
base model, trained by the pipeline's own first stage on general text (configs/demo_base.json; two to three minutes on
two cores).

    python scripts/make_demo.py
    python scripts/make_demo.py --seed 8 --restart     # another world; arguments not known here go to pretraining.py
"""

import argparse
import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from demo.files import all_characters, build_files, tokenizer_text
from qilin_med.artifact import MANIFEST, digest, publish_folder, quarantine, verify_folder
from qilin_med.console.progress import progress
from qilin_med.errors import UserError, user_errors_end_with_one_line
from qilin_med.train.stage import quiet_libraries

REPOSITORY = Path(__file__).resolve().parents[1]
DATA, UNTRAINED = Path("data/demo"), Path("models/demo-init")
BUILT = ("processed", "processed.work")
VOCABULARY = 1664
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7, help="which world (default: 7)")
    parser.add_argument(
        "--config", default=REPOSITORY / "configs/demo_base.json", help="experiment file of the base model"
    )
    parser.add_argument("--no-training", action="store_true", help="stop before the base model is trained")
    options, for_training = parser.parse_known_args()
    quiet_libraries()
    sys.stdout.reconfigure(line_buffering=True)  # in order with what the training below prints, also in a pipe
    with progress("making the demo's world"):
        files = build_files(options.seed)
        write_data(files)
        write_untrained_model(files, options.seed)
    if not options.no_training:
        command = [sys.executable, str(REPOSITORY / "pretraining.py"), "--config", str(options.config), *for_training]
        os.execv(sys.executable, command)  # its own process would not hear of Ctrl-C in time to save a checkpoint


def write_data(files: dict[str, bytes]) -> None:
    if DATA.is_dir() and {name: content for name, content in _files_below(DATA)} == files:
        print(f"{DATA}: the same world is already there")
        return
    if DATA.exists() and not (DATA / "manifest.json").is_file():
        raise UserError(f"{DATA}: exists but was not written by this script (no manifest.json); move it away")
    part = DATA.with_name(f".{DATA.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name, content in files.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        (part / name).write_bytes(content)
    shutil.rmtree(DATA, ignore_errors=True)
    part.rename(DATA)
    print(f"{DATA}: {len(files)} files, {sum(map(len, files.values())) / 1e6:.1f} MB")


def _files_below(folder: Path) -> list[tuple[str, bytes]]:
    """All but what scripts/build_chimed.py made of them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = [path.relative_to(folder) for path in files]
    return [(n.as_posix(), p.read_bytes()) for n, p in zip(names, files, strict=True) if n.parts[0] not in BUILT]


def write_untrained_model(files: dict[str, bytes], seed: int) -> None:
    text, characters = tokenizer_text(files), all_characters(files)
    made_from = digest({"text": text, "characters": characters, "model": MODEL, "vocabulary": VOCABULARY, "seed": seed})
    if UNTRAINED.exists():
        if (UNTRAINED / MANIFEST).is_file() and verify_folder(UNTRAINED).get("made_from") == made_from:
            print(f"{UNTRAINED}: the same untrained model is already there")
            return
        print(f"{UNTRAINED}: made for another world, kept as {quarantine(UNTRAINED, 'replaced')}")
    part = UNTRAINED.with_name(f".{UNTRAINED.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tokenizer = make_tokenizer(text, characters, part)
    parameters = make_model(tokenizer, seed, part)
    publish_folder(part, UNTRAINED, {"made_from": made_from, "seed": seed, "parameters": parameters})
    print(f"{UNTRAINED}: untrained Llama, {parameters / 1e6:.2f}M parameters, {len(tokenizer)} tokens")


def make_tokenizer(lines: list[str], characters: str, folder: Path) -> Any:
    """A tokenizer of Baichuan's kind: SentencePiece BPE with byte fallback and reserved role marks. It is learnt from
    general text, as a general model's is; of the medicine it knows the characters only."""
    import sentencepiece

    from qilin_med.model.tokenizer import fast_tokenizer_from_sentencepiece
    from qilin_med.prompt.template import QILIN_TEMPLATE, ROLE_MARKS

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        required_chars=characters,
        user_defined_symbols=[*ROLE_MARKS, "\n"],
        normalization_rule_name="identity",
        max_sentencepiece_length=4,  # words, not the sentence patterns that templates repeat
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,  # more could order ties differently
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = fast_tokenizer_from_sentencepiece(
        folder / "tokenizer.model", chat_template=QILIN_TEMPLATE, max_length=MODEL["max_position_embeddings"]
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(tokenizer: Any, seed: int, folder: Path) -> int:
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **MODEL, **special))
    model.save_pretrained(folder)
    return model.num_parameters()


if __name__ == "__main__":
    with user_errors_end_with_one_line():
        main()
