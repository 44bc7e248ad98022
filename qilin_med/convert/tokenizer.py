"""A fast tokenizer made from a SentencePiece BPE model, giving SentencePiece's own ids.

transformers' own conversion (LlamaTokenizer) assumes an identity normaliser and no user-defined pieces. Baichuan-7B has
the nmt_nfkc normaliser and 390 user-defined pieces, so that conversion silently gives other ids for many texts. What
SentencePiece does is in its normalizer.cc (Normalize, NormalizePrefix), bpe_model.cc (SampleEncode) and
sentencepiece_processor.cc (Decode). Here it is composed from public parts of `tokenizers`, so that the saved
tokenizer.json needs neither the .model file nor remote code.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceNormalizer
from sentencepiece import sentencepiece_model_pb2 as spm
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from qilin_med.errors import UserError
from qilin_med.prompt.template import ROLE_MARKS

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
SPACE = "▁"

# Put between two characters that may not compose, or may not be looked up together. All four are unassigned and count
# as controls: they never compose, always end a grapheme, and no text holds two of them in a row.
BARRIER, FENCE = "\ufff0\ufff1", "\ufff2\ufff3"

MOST_RULES_BEYOND = 64  # each costs a pass over every text

KIND = spm.ModelProto.SentencePiece.Type.Value


def fast_tokenizer_from_sentencepiece(
    model_file: Path, chat_template: str | None = None, max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of a SentencePiece BPE model with byte fallback.

    Ids equal SentencePiece's: with `split_special_tokens=True` for every text, else for every text that holds no
    special token literally. Note that SentencePiece itself reads a role mark typed in a text as the mark's id.

    Decoding equals SentencePiece's for all ids that texts give. For other ids there are two exceptions: where a run of
    byte pieces is not valid UTF-8, each of its bytes becomes "�" (SentencePiece keeps the valid characters among them);
    control pieces and `<unk>` appear by name, or not at all by `skip_special_tokens` (SentencePiece: "" and " ⁇ ").
    """
    model = read_sentencepiece_bpe(model_file)
    spec = model.normalizer_spec
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    kept = [piece.piece for piece in model.pieces if piece.type == KIND("USER_DEFINED")]
    # SentencePiece merges any two neighbours that form a normal piece, best score first: every split is a merge.
    by_score = sorted((p for p in model.pieces if p.type == KIND("NORMAL")), key=lambda piece: -piece.score)
    normal = {piece.piece: None for piece in by_score}
    splits = ((piece[:cut], piece[cut:]) for piece in normal for cut in range(1, len(piece)))
    merges = [(left, right) for left, right in splits if left in normal and right in normal]
    # ignore_merges makes a user-defined piece, which no merge builds, one token.
    tokenizer = Tokenizer(BPE(vocabulary, merges, byte_fallback=True, ignore_merges=True, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(normalizer_steps(spec, kept))
    # User-defined pieces are split off first; then text that only looks like a piece is kept from becoming that piece.
    patterns = [*([quick_any_of(kept)] if kept else []), false_wholes(vocabulary, merges, kept)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(p), "isolated") for p in patterns])
    # Bytes to characters, then "▁" to spaces, less the one that the normaliser had put before the text.
    leading = rf"\A{SPACE}{'+' if spec.remove_extra_whitespaces else ''}"
    is_led = spec.add_dummy_prefix or spec.remove_extra_whitespaces
    to_spaces = [*([decoders.Replace(Regex(leading), "")] if is_led else []), decoders.Replace(SPACE, " ")]
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), *to_spaces])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=UNKNOWN,  # Baichuan has no padding piece; its config says pad_token_id 0
        add_bos_token=False,
        add_eos_token=False,
        # As special tokens, text between role marks is normalised on its own.
        extra_special_tokens=[AddedToken(m, special=True, normalized=False) for m in ROLE_MARKS if m in vocabulary],
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
        **({"model_max_length": max_length} if max_length else {}),
    )


def read_sentencepiece_bpe(model_file: Path) -> spm.ModelProto:
    """Parse the model; UserError if anything in it rules out equal ids."""
    model = spm.ModelProto()
    try:
        model.ParseFromString(Path(model_file).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{model_file} is missing; expected the SentencePiece model of the tokenizer") from None
    except DecodeError:
        raise UserError(
            f"{model_file} is no SentencePiece model (truncated or another format); fetch it again"
        ) from None
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = {piece.piece: piece.type for piece in model.pieces}
    suffixes = trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces
    obstacles = [
        (not kinds, "no pieces"),
        (trainer.model_type != trainer.BPE, f"model type {trainer.ModelType.Name(trainer.model_type)}"),
        (not trainer.byte_fallback and "<0x00>" not in kinds, "no byte pieces"),
        *((name not in kinds, f"no piece {name}") for name in (UNKNOWN, BEGIN, END)),
        (KIND("UNUSED") in kinds.values(), "unused pieces"),
        (suffixes, "whitespace that is not a '▁' before the word"),
    ]
    for is_there, obstacle in obstacles:
        if is_there:
            raise UserError(f"{model_file} has {obstacle}; only BPE models with byte fallback can be converted")
    return model


# ------------------------------------------------------------------------------------------------------ normaliser


def normalizer_steps(spec: spm.NormalizerSpec, kept: list[str]) -> list[normalizers.Normalizer]:
    """Dummy prefix, character rules, whitespace, in an order that leaves an emptied text "▁", as SentencePiece does."""
    prefix = [normalizers.Prepend(SPACE)] if spec.add_dummy_prefix else []
    rules = rule_steps(spec, kept) if spec.precompiled_charsmap else []
    escape = [normalizers.Replace(" ", SPACE)]
    if not spec.remove_extra_whitespaces:
        return [*prefix, *rules, *escape]
    squeeze = [normalizers.Replace(Regex(" +"), " "), normalizers.Replace(Regex(r"\A "), "")]
    return [*rules, *squeeze, *prefix, *escape, normalizers.Replace(Regex(rf"{SPACE}+\z"), "")]


def rule_steps(spec: spm.NormalizerSpec, kept: list[str]) -> list[normalizers.Normalizer]:
    """The charsmap: the longest rule at each place is applied, and user-defined pieces are left as they are.

    `normalizers.Precompiled` works on graphemes (it drops the rest of one whose first character has a rule, and misses
    rules of six bytes or more), so it gets the rules of single characters only, and graphemes fenced apart. Rules of
    several characters all compose (か + ゛ = が): NFC does so too, given barriers where SentencePiece would not.
    """
    rules = dict(SentencePieceNormalizer(normalizer_spec=spec).decompile())
    singles = {key: value for key, value in rules.items() if len(key) == 1 and key not in kept}
    sentencepiece.set_min_log_level(1)  # it reports its progress on stderr
    blob = SentencePieceNormalizer(norm_map=list(singles.items())).serialized_normalizer_spec()
    joining = character_class(joining_characters(rules, singles))
    return [
        normalizers.Replace(Regex(barrier_places(rules, joining, kept)), BARRIER),
        *(normalizers.Replace(key, value) for key, value in rules_beyond(rules, singles, kept).items()),
        normalizers.Replace(Regex(rf"(?m)(?<=.)(?=[{joining}])"), FENCE),  # Precompiled panics on a fence at the start
        normalizers.Precompiled(spm.NormalizerSpec.FromString(blob).precompiled_charsmap),
        normalizers.Replace(FENCE, ""),
        normalizers.NFC(),
        normalizers.Replace(BARRIER, ""),
    ]


def rules_beyond(rules: dict[str, str], singles: dict[str, str], kept: list[str]) -> dict[str, str]:
    """Rules that single characters and NFC do not cover, longest first: compositions newer than our NFC."""

    def composed(texts: Collection[str]) -> list[str]:
        # By the library: Python has another version of Unicode.
        applied = ("".join(singles.get(character, character) for character in text) for text in texts)
        return normalizers.NFC().normalize_str(BARRIER.join(applied)).split(BARRIER) if texts else []

    expected = rules | {piece: piece for piece in kept}
    pairs = zip(expected.items(), composed(expected), strict=True)
    beyond = {key: value for (key, value), found in pairs if found != value}
    stable = composed(beyond.values()) == list(beyond.values())
    changed = [key for key in beyond if len(key) == 1 or key in kept or not stable]
    if changed or len(beyond) > MOST_RULES_BEYOND:
        key = (changed or list(beyond))[0]
        raise UserError(
            f"the normaliser turns {key!r} into {expected[key]!r}, neither a rule of one character nor a composition"
            f" ({len(beyond)} such rules); only the normalisers identity, nfkc and nmt_nfkc can be converted"
        )
    return dict(sorted(beyond.items(), key=lambda rule: (-len(rule[0]), rule[0])))


def barrier_places(rules: dict[str, str], joining: str, kept: list[str]) -> str:
    """A pattern with an empty match before every character that could join the one before it, but must not.

    It walks as SentencePiece does from unit to unit (the end of a user-defined piece, else the longest rule, else one
    character), through each run of joining characters; a match over the whole text would meet Oniguruma's retry limit.
    """
    composed = alternatives_by_first([key for key in rules if len(key) > 1]) or "(?!)"
    kept_end = rf".(?<={any_of(kept)})|" if kept else ""
    unit_start = rf"(?=.[{joining}])(?:\G|(?=[^{joining}]))"
    return rf"(?m){unit_start}(?>{kept_end}{composed}|.)\K(?=[{joining}])|\r\K(?=\n)"


def joining_characters(rules: dict[str, str], singles: dict[str, str]) -> set[str]:
    """What composes with, or lies in one grapheme with, the character before it, itself or once its rule is applied."""
    tails = {character for key in rules for character in key[1:]}
    marks = ("Mn", "Mc", "Me", "Cn")  # what Python's Unicode does not know yet may be a mark in a newer one
    joins = {c for c in map(chr, range(0x110000)) if unicodedata.category(c) in marks} | tails
    joins |= {"\u200c", "\u200d"} | set(map(chr, [*range(0x1F3FB, 0x1F400), *range(0xE0020, 0xE0080)]))
    return joins | {key for key, value in singles.items() if value[:1] in joins and value}


# ------------------------------------------------------------------------------------------------------- patterns


def alternatives_by_first(keys: Collection[str]) -> str:
    """A pattern for the longest of these keys: first characters that share the same continuations share a branch."""
    continuations, branches = defaultdict(set), defaultdict(list)
    for key in sorted(keys):  # sorted: the same model gives the same file, byte for byte
        continuations[key[0]].add(key[1:])
    for first, rest in continuations.items():
        branches[frozenset(rest)].append(first)
    patterns = []
    for rest, firsts in branches.items():
        longer = alternatives_by_first(rest - {""})
        continued = f"(?:{longer}){'?' if '' in rest else ''}" if longer else ""
        patterns.append(f"[{character_class(firsts)}]{continued}")
    return "|".join(patterns)


def character_class(characters: Iterable[str]) -> str:
    """The inside of a [...]: code points in hexadecimal, neighbours drawn together."""
    runs: list[list[int]] = []
    for code in sorted(set(map(ord, characters))):
        if runs and code == runs[-1][1] + 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(rf"\x{{{first:x}}}-\x{{{last:x}}}" for first, last in runs)


def any_of(pieces: Iterable[str]) -> str:
    """A pattern for the longest of these pieces at a place."""
    return "|".join(map(re.escape, sorted(pieces, key=len, reverse=True)))


def quick_any_of(pieces: list[str]) -> str:
    """The same, a quarter faster: one look at a character rules out most places and settles pieces of one character."""
    longer = [piece for piece in pieces if len(piece) > 1]
    short = [piece for piece in pieces if len(piece) == 1]
    patterns = [rf"(?=[{character_class(piece[0] for piece in longer)}])(?:{any_of(longer)})"] if longer else []
    return "|".join([*patterns, *([rf"[{character_class(short)}]"] if short else [])])


def false_wholes(vocabulary: dict[str, int], merges: list[tuple[str, str]], kept: list[str]) -> str:
    """A pattern for the first token of text that reads like a piece, but that merging would not turn into one.

    These are the control and byte pieces ("</s>", "<0x0A>" typed as text) and the rare piece that greedy merging never
    reaches; ignore_merges would take them whole. What merging leaves apart can be split without changing ids.
    """
    names = sorted(vocabulary.keys() - set(kept))
    merging = Tokenizer(BPE(vocabulary, merges, byte_fallback=True, unk_token=UNKNOWN))
    cuts = [(name, coded.offsets[0][1]) for name, coded in zip(names, merging.encode_batch(names), strict=True)]
    apart = [(name[:cut], name[cut:]) for name, cut in cuts if cut < len(name)]
    return r"\A(?:" + "|".join(rf"{re.escape(first)}(?={re.escape(rest)}\z)" for first, rest in apart) + ")"
