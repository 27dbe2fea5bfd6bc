"""
Laws of extras/tokenizer.py for any Unicode text. The reference is a second, slow version of Google's BERT below; the
ids in ANSWERS are those of the `tokenizers` package (0.23.3), which no test needs.
"""

import os
import pickle
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extras.runtime import UserError
from extras.tokenizer import Tokenizer, split_words

law = settings(deadline=None, max_examples=60)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = (
    "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] a b e k wool wo coat ##l ##ly ##en ##s emile cafe i s x y xy ss "
    "mask un unused 1 0 "
    ". , ! ? ; ' - [ ] # ` $ ₤ ～ ## ##a ##b ##y ##z ##e ##used ##0 ##2 "
    "日 本 ##本 豈 丽 ᄀ ##ᅡ σ ##σ ##ς ß ##\u0301 ##\u302e ##\U0001d165 ##\U0002b820"
).split()
TOKENIZER = Tokenizer(WORDS)

TRICKY = st.sampled_from(
    list("abekxyzlABEKXYZ01.,!?#[]'-$₤`")
    + list(" \t\n\r\x00\x0b\x0c\x1c\x1f\x85\xa0\xad\u1680\u180e\u2000\u2028\u2029\u200b\u3000\ufeff\ufffd\ue000\ud800")
    + list("ΣσςİıßẞÉéǅΩÅ\u212a\u0301\u0300\u0327\u0345\u0488\u302e\U0001d165")
    + list("日本\uf900\U0002f800\U0002b820\U0002b920가각")
    + SPECIAL + ["[mask]", "[MASK", "[unused0]", "##", "wool", "woolly", "coats", "emile", "a" * 99]
)
TEXT = st.lists(TRICKY | st.characters(exclude_categories=()) | st.sampled_from(WORDS)).map("".join)
PLAIN_WORDS = [word for word in WORDS if word.isalnum() and not any("ᄀ" <= c for c in word)]
SYLLABLES = st.sampled_from("a aa ab ba abb bab cab abcab".split())
CAPTION = st.text("abcé日-. ", max_size=12) | st.lists(SYLLABLES, max_size=12).map(" ".join)
CAPTIONS = st.lists(CAPTION, min_size=1, max_size=6).filter(lambda captions: "".join(captions).strip())


# --- What BERT says ---

ANSWERS = [
    ("", ""),
    (" \t\n ", ""),
    ("wool coats", "wool coat ##s"),
    ("WOOLLY", "wool ##ly"),
    ("Woollen, woolx!", "wool ##l ##en , [UNK] !"),
    ("wool-coat", "wool - coat"),
    ("won", "[UNK]"),
    ("12 120", "1 ##2 1 ##2 ##0"),
    # accents go, by themselves or on their letter, and only those without a width
    ("Émile's CAFÉ.", "emile ' s cafe ."),
    ("e\u0301mile cafe\u0327\u0301", "emile cafe"),
    ("x\u0488y", "[UNK]"),
    ("x\u0903y", "[UNK]"),
    ("a\u302e\U0001d165", "a ##\U0001d165 ##\u302e"),
    ("a\u302e\x00\U0001d165", "a ##\U0001d165 ##\u302e"),
    ("\uac00", "ᄀ ##ᅡ"),
    # lower-case is made letter by letter
    ("aΣ", "a ##σ"),
    ("İ", "i"),
    ("ı", "[UNK]"),
    ("ẞ ß", "ß ß"),
    ("\u212a", "k"),
    # spaces of any kind part words; control characters are as if they were not there
    ("a\tb\na\rb", "a b a b"),
    ("a\xa0b\u3000a\u2028b\u1680a", "a b a b a"),
    ("a\x00b", "a ##b"),
    ("a\x0bb a\x1cb a\x85b", "a ##b a ##b a ##b"),
    ("a\u200bb a\ufffdb a\ue000b", "a ##b a ##b a ##b"),
    ("x\u180ey wool\xadly", "xy wool ##ly"),
    ("a\u0378b", "[UNK]"),
    # Chinese characters stand alone, save some of the block that begins at 2B820
    ("日本", "日 本"),
    ("x日y本", "x 日 y 本"),
    ("\uf900", "豈"),
    ("\U0002f800", "丽"),
    ("a\U0002b820b", "a ##\U0002b820 ##b"),
    ("a\U0002b920b", "a [UNK] b"),
    # punctuation stands alone, and so do the symbols of ASCII; other symbols are letters
    ("a$b a₤b", "a $ b [UNK]"),
    ("a～b ～", "[UNK] ～"),
    ("\u1fef a\u037eb", "` a ; b"),
    ("##ly", "# # [UNK]"),
    ("\U0001f600", "[UNK]"),
    # a word has at most 100 letters, counted when the accents have gone
    ("a" * 100, " ".join(["a"] + ["##a"] * 99)),
    ("a" * 101 + ".b", "[UNK] . b"),
    ("a\u0301" * 100, " ".join(["a"] + ["##a"] * 99)),
    # special tokens are kept where they are written exactly so
    ("[MASK] a[MASK]b", "[MASK] a [MASK] b"),
    ("[mask] [MASK", "[ mask ] [ mask"),
    ("[[SEP]][CLS][PAD]", "[ [SEP] ] [CLS] [PAD]"),
    ("[MA\u200bSK] [MA\x1cSK]", "[ mask ] [ mask ]"),
    ("[UNK]ly", "[UNK] [UNK]"),
    ("[unused0]", "[ unused ##0 ]"),
]


@pytest.mark.parametrize("text, pieces", ANSWERS)
def test_the_ids_are_those_of_bert(text, pieces):
    assert [WORDS[i] for i in TOKENIZER.encode(text)] == ["[CLS]", *pieces.split(), "[SEP]"]


def slow_words(text):
    """The words of a text without special tokens, letter by letter as in Google's BasicTokenizer."""
    clean = ""
    for c in text:
        category = unicodedata.category(c)
        if c in "\t\n\r" or category in ("Zs", "Zl", "Zp"):
            clean += " "
        elif category not in ("Cc", "Cf", "Co", "Cs") and c != "\ufffd":
            clean += f" {c} " if is_chinese(ord(c)) else c
    words = []
    for word in clean.split(" "):
        words.append("")
        for c in unicodedata.normalize("NFD", word):
            if 33 <= ord(c) < 127 and not c.isalnum() or unicodedata.category(c).startswith("P"):
                words += [c, ""]
            elif unicodedata.category(c) != "Mn":
                words[-1] += c.lower()
    return [word for word in words if word]


def is_chinese(code):
    return (
        0x4E00 <= code <= 0x9FFF
        or 0x3400 <= code <= 0x4DBF
        or 0x20000 <= code <= 0x2A6DF
        or 0x2A700 <= code <= 0x2B81F
        or 0x2B920 <= code <= 0x2CEAF
        or 0xF900 <= code <= 0xFAFF
        or 0x2F800 <= code <= 0x2FA1F
    )


def slow_pieces(word, vocabulary):
    """A word in pieces, by looking at the whole vocabulary for each."""
    pieces, rest = [], word
    while rest:
        mark = "##" if pieces else ""
        fits = [piece for piece in vocabulary if (mark + rest).startswith(piece)]
        fits = [piece for piece in fits if piece.startswith("##") == bool(mark) and piece != "##"]
        if not fits or len(word) > 100:
            return ["[UNK]"]
        pieces.append(max(fits, key=len))
        rest = rest[len(pieces[-1]) - 2 * (len(pieces) > 1):]
    return pieces


@law
@given(text=TEXT.filter(lambda text: not any(word in text for word in SPECIAL)))
def test_words_are_those_of_a_slow_bert(text):
    assert split_words(text) == slow_words(text)


def test_every_letter_of_unicode_is_treated_as_by_a_slow_bert():
    assigned = [*range(0x32400), *range(0xE0000, 0xE0200), 0xF0000, 0x10FFFD]  # between these: private use
    letters = [f"x{chr(code)}y" for code in assigned]
    assert [text for text in letters if split_words(text) != slow_words(text)] == []


@law
@given(text=TEXT)
def test_each_piece_is_the_longest_that_the_vocabulary_holds(text):
    pieces = []
    for word in split_words(text):
        pieces += [word] if word in SPECIAL else slow_pieces(word, WORDS)
    assert [WORDS[i] for i in TOKENIZER.encode(text)] == ["[CLS]", *pieces, "[SEP]"]


# --- Encoding ---


@law
@given(text=TEXT, length=st.none() | st.integers(2, 40))
def test_ids_stay_in_range_between_cls_and_sep(text, length):
    ids = TOKENIZER.encode(text, length)
    assert all(type(i) is int and 0 <= i < len(TOKENIZER) for i in ids)
    assert ids[0] == TOKENIZER.cls_id and TOKENIZER.sep_id in ids


@law
@given(text=TEXT, length=st.integers(2, 40))
def test_length_cuts_before_sep_and_pads_after_it(text, length):
    ids, whole = TOKENIZER.encode(text, length), TOKENIZER.encode(text)
    assert len(ids) == length
    if len(whole) >= length:
        assert ids == whole[:length - 1] + [TOKENIZER.sep_id]
    else:
        assert ids == whole + [0] * (length - len(whole))


@law
@given(first=TEXT, second=TEXT, space=st.sampled_from(" \t\n\r\xa0\u3000\u2028"))
def test_what_stands_beyond_a_space_changes_nothing(first, second, space):
    assert TOKENIZER.encode(first + space + second) == TOKENIZER.encode(first)[:-1] + TOKENIZER.encode(second)[1:]


@law
@given(text=TEXT)
def test_a_text_met_before_gets_the_same_ids(text):
    fresh = Tokenizer(WORDS)
    once = fresh.encode(text)
    once_more = fresh.encode(text, len(once) + 3)
    assert once_more[:-3] == once == fresh.encode(text) == pickle.loads(pickle.dumps(fresh)).encode(text)


@pytest.mark.parametrize("length", [1, 0, -5])
def test_a_length_without_room_for_cls_and_sep_is_an_error(length):
    with pytest.raises(ValueError, match=f"length must be at least 2, for .CLS. and .SEP., got {length}"):
        TOKENIZER.encode("wool", length)


def test_special_ids_are_the_special_tokens_and_the_unused():
    assert [WORDS[i] for i in TOKENIZER.special_ids] == ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert TOKENIZER.pad_id == 0
    named = [TOKENIZER.pad_id, TOKENIZER.unk_id, TOKENIZER.cls_id, TOKENIZER.sep_id, TOKENIZER.mask_id]
    assert [TOKENIZER.words[i] for i in named] == SPECIAL


# --- Decoding ---


@law
@given(words=st.lists(st.sampled_from(PLAIN_WORDS)), length=st.integers(0, 5))
def test_decoding_gives_back_a_text_of_known_words(words, length):
    text = " ".join(words)
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text, len(words) + 2 + length)) == text


@law
@given(text=TEXT.filter(lambda text: not any(word in text for word in ("[PAD]", "[CLS]", "[SEP]"))))
def test_encoding_a_decoded_text_gives_back_its_ids(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.encode(TOKENIZER.decode(ids)) == ids


DECODED = [
    ("Woolly coats, cafe!", "woolly coats, cafe!"),
    ("emile's wool - coat.", "emile ' s wool - coat."),
    ("a [MASK] coat? won", "a [MASK] coat? [UNK]"),
    ("[CLS]a[SEP]b[PAD]", "a b"),
    ("..", ".."),
]


@pytest.mark.parametrize("text, decoded", DECODED)
def test_decoded_text_reads_as_that_of_berts_decoder(text, decoded):
    assert TOKENIZER.decode(TOKENIZER.encode(text, 20)) == decoded


@pytest.mark.parametrize("i", [-1, len(WORDS)])
def test_an_id_outside_the_vocabulary_cannot_be_decoded(i):
    with pytest.raises(ValueError, match=f"an id must lie in .0, {len(WORDS)}., the size of the vocabulary, got {i}"):
        TOKENIZER.decode([6, i])


# --- Learning a vocabulary ---


def slow_training(captions, size):
    """The words that train learns, by counting everything again for each of them."""
    counts = Counter(word for caption in captions for word in slow_words(caption))
    letters = Counter("".join(word * times for word, times in counts.items()))
    learnt = []
    for c, _ in sorted(letters.items(), key=lambda item: (-item[1], item[0])):
        forms = {c, "##" + c} if c.isalnum() and not is_chinese(ord(c)) else {c}
        if len(learnt) + len(forms) > size - 5:
            break
        learnt += forms
    learnt.sort()
    words = [([word[0]] + ["##" + c for c in word[1:]], times) for word, times in counts.items()]
    words = [(pieces, times) for pieces, times in words if set(pieces) <= set(learnt)]
    while len(learnt) < size - 5:
        pairs = Counter()
        for pieces, times in words:
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += times
        first, second = min(pairs, key=lambda pair: (-pairs[pair], pair), default=("", ""))
        if pairs[first, second] < 2:
            break
        for pieces, _ in words:
            for i in range(len(pieces)):
                if pieces[i:i + 2] == [first, second]:
                    pieces[i:i + 2] = [first + second[2:]]
        learnt += [first + second[2:]] if first + second[2:] not in learnt else []
    return SPECIAL + learnt


@law
@given(captions=CAPTIONS, size=st.integers(6, 40))
def test_training_learns_what_counting_everything_again_would(captions, size):
    assert Tokenizer.train(captions, size).words == slow_training(captions, size)


@law
@given(captions=CAPTIONS, size=st.integers(6, 40), random=st.randoms())
def test_training_does_not_depend_on_the_order_of_the_captions(captions, size, random):
    shuffled = random.sample(captions, len(captions))
    assert Tokenizer.train(shuffled, size).words == Tokenizer.train(captions, size).words


def test_training_does_not_depend_on_the_hash_seed():
    captions = ["wool coat in navy", "woolly hat in white wool", "navy coats, white hats", "the hatter wove a coat"]
    program = f"from extras.tokenizer import Tokenizer; print(*Tokenizer.train({captions!r}, 60).words)"
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.split() == Tokenizer.train(iter(captions), 60).words


@law
@given(captions=st.lists(TEXT, min_size=1), size=st.integers(6, 60))
def test_a_trained_vocabulary_holds_the_special_tokens_and_at_most_size_words(captions, size):
    try:
        tokenizer = Tokenizer.train(captions, size)
    except UserError:
        words = [word for caption in captions for word in split_words(caption)]
        assert all(word in SPECIAL or len(word) > 100 for word in words)
        return
    assert tokenizer.words[:5] == SPECIAL
    assert 5 <= len(tokenizer) <= size
    assert all(0 <= i < len(tokenizer) for caption in captions for i in tokenizer.encode(caption))


@law
@given(captions=CAPTIONS, text=st.text("abcé日-. "))
def test_no_word_of_letters_seen_in_training_is_unknown(captions, text):
    tokenizer = Tokenizer.train(captions, 100)
    known = "".join(c for c in text if c in "".join(captions) or c == " ")
    assert tokenizer.unk_id not in tokenizer.encode(known)


def test_frequent_words_become_one_piece_and_their_parts_serve_new_words():
    tokenizer = Tokenizer.train(["wool coat", "wool coats", "raincoat", "hat and hats"] * 5, 60)
    ids = tokenizer.encode("wool coat")
    assert tokenizer.decode(ids) == "wool coat" and len(ids) == 4
    assert "##coat" in tokenizer.words or "##oat" in tokenizer.words
    assert tokenizer.unk_id not in tokenizer.encode("noncoat trench")[1:3]


def test_training_on_nothing_is_an_error():
    for captions in ([], ["", " \t", "\u0301"], ["[MASK]", "a" * 101]):
        with pytest.raises(UserError, match="the captions hold no words"):
            Tokenizer.train(captions)
    with pytest.raises(ValueError, match="size must be above 5, the number of special tokens, got 5"):
        Tokenizer.train(["wool"], 5)


# --- The file ---


@law
@given(captions=CAPTIONS, bom=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_a_saved_vocabulary_is_read_back_in_any_editors_spelling(tmp_path_factory, captions, bom, end):
    path = tmp_path_factory.getbasetemp() / "vocab.txt"
    words = Tokenizer.train(captions, 40).words
    Tokenizer(words).save(path)
    assert path.read_bytes() == "\n".join([*words, ""]).encode()
    path.write_bytes(b"\xef\xbb\xbf" * bom + end.join([*words, ""]).encode())
    assert Tokenizer.load(path).words == words


ALL = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"
BROKEN = [
    (b"", "a vocabulary must hold words, one a line, but this is empty"),
    (b" \n\n", "a vocabulary must hold words, one a line, but this is empty"),
    (b"\x89PNG\r\n", "a vocabulary must be UTF-8 text, but byte 0 is not"),
    (ALL + "café".encode("latin-1"), "a vocabulary must be UTF-8 text, but byte 34 is not"),
    (ALL.replace(b"[SEP]\n", b""), "a vocabulary must hold [PAD] [UNK] [CLS] [SEP] [MASK], but [SEP] is missing"),
    (b"wool\ncoat\n", f"a vocabulary must hold {' '.join(SPECIAL)}, but {' '.join(SPECIAL)} is missing"),
    (ALL + b"x" * 999 + b" y\n", "line 6 must hold one word, got '" + "x" * 76 + "..."),
    (ALL + b"wool\ncoat\nwool\n", "line 8 repeats 'wool' of line 6; remove one of them"),
    (ALL + b"wool\n\ncoat\n", "line 7 must hold one word, got ''"),
    (ALL + b"wool coat\n", "line 6 must hold one word, got 'wool coat'"),
    (b"wool\n" + ALL, "[PAD] must be on line 1 (id 0), but it is on line 2"),
]


@pytest.mark.parametrize("content, message", BROKEN)
def test_a_broken_vocabulary_is_one_error_that_names_the_file_and_the_rule(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Tokenizer.load(path)
    assert str(error.value) == f"{path}: {message}"


def test_a_vocabulary_of_anything_but_words_is_an_error():
    with pytest.raises(UserError, match="file.pt: line 6 must hold one word, got 7"):
        Tokenizer([*SPECIAL, 7], source="file.pt")


def test_a_vocabulary_that_cannot_be_read_or_written_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reasons = {"none.txt": "cannot read the vocabulary: No such file or directory", "pipe": "not a regular file"}
    for name, reason in reasons.items():
        with pytest.raises(UserError) as error:
            Tokenizer.load(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name}: {reason}"
    with pytest.raises(UserError) as error:
        TOKENIZER.save(tmp_path / "none" / "vocab.txt")
    assert str(error.value) == f"{tmp_path}/none/vocab.txt: cannot be written (No such file or directory)"
