"""
BERT's uncased WordPiece tokenizer: reading a vocabulary, learning one from captions, encoding and decoding.

    tokenizer = Tokenizer.load("vocab.txt")               # or Tokenizer.train(captions, size=8000)
    tokenizer.encode("woolly coat", length=6)             # [2, 812, 95, 130, 3, 0]: [CLS] wool ##ly coat [SEP] [PAD]

A text is cleaned and split into words (`split_words`). Each word is then cut greedily into the longest pieces of the
vocabulary, where "##" marks a piece that continues a word. The ids agree with those of the `tokenizers` package for any
Unicode text, except that accents and punctuation follow the Unicode version of this Python.
"""

import heapq
import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from extras.runtime import UserError, quoted, whole_file

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LONGEST_WORD = 100  # characters; BERT replaces a longer word by [UNK]
LARGEST_CACHE = 1_000_000  # entries: more than any catalogue needs, and a bound on the memory of a server

# --- Words ---

SPACES = re.compile(r"[^\S\x0b\x0c\x1c-\x1f\x85]+")  # without the control characters that Python counts as white space
SPECIAL_IN_TEXT = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
CHINESE = [  # Google's code begins the block of 2B920 at 2B820, as Unicode does; the `tokenizers` package does not
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0x2F800, 0x2FA1F),
]


class CharacterTable(dict):
    """A table for `str.translate` that calls `rule` for each character when it first occurs."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def __missing__(self, code):
        self[code] = self.rule(chr(code))
        return self[code]


def clean_character(c):
    """BERT's first pass: drop control characters, turn any white space into a space, set Chinese characters apart."""
    if SPACES.fullmatch(c):
        return " "
    if c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs"):
        return ""
    if any(first <= ord(c) <= last for first, last in CHINESE):
        return f" {c} "
    return c


def plain_character(c):
    """BERT's second pass, over decomposed text: drop accents, set punctuation apart, make the rest lower-case."""
    category = unicodedata.category(c)
    if category == "Mn":
        return ""
    if category[0] == "P" or c in "$+<=>^`|~":
        return f" {c} "
    return c.lower()


CLEAN = CharacterTable(clean_character)
PLAIN = CharacterTable(plain_character)


def split_spaces(text):
    """What stands between the spaces of a text. Most texts are printable: no odd spaces."""
    return text.split() if text.isprintable() else SPACES.split(text)


def split_words(text):
    """The words of a text before they are cut into pieces: "Émile's [MASK]" -> ["emile", "'", "s", "[MASK]"]."""
    words = []
    for part in SPECIAL_IN_TEXT.split(text):
        if part in SPECIAL:
            words.append(part)
        else:
            decomposed = unicodedata.normalize("NFD", part.translate(CLEAN))
            words += decomposed.translate(PLAIN).split()
    return words


# --- The tokenizer ---


class Tokenizer:
    """BERT's uncased WordPiece over a list of words; the place of a word in the list is its id, and 0 is padding."""

    def __init__(self, words, source="vocabulary"):
        self.words = list(words)
        check_vocabulary(self.words, source)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (self.ids[word] for word in SPECIAL)
        self.special_ids = [i for i, word in enumerate(self.words) if is_special(word)]
        self.cache = {}  # text between two spaces -> its ids

    @classmethod
    def load(cls, path):
        """Read a vocab.txt as BERT's: one word a line, and the line number is the id."""
        path = Path(path)
        try:
            if path.exists() and not path.is_file():
                raise UserError(f"{path}: not a regular file")
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: a vocabulary must be UTF-8 text, but byte {error.start} is not") from None
        except OSError as error:
            raise UserError(f"{path}: cannot read the vocabulary: {error.strerror}") from None
        lines = text.rstrip().split("\n") if text.strip() else []
        return cls([line.rstrip() for line in lines], source=path)

    def save(self, path):
        """Write the vocabulary as BERT's vocab.txt."""
        with whole_file(path) as file:
            file.write("".join(f"{word}\n" for word in self.words).encode())

    @classmethod
    def train(cls, captions, size=8000):
        """
        Learn a vocabulary of at most `size` words: the special tokens, the characters that occur, then repeatedly the
        pair of neighbouring pieces that occurs most often, joined (Sennrich et al. 2016, in BERT's notation). Ties are
        broken alphabetically, so the order of the captions does not matter.
        """
        if size <= len(SPECIAL):
            raise UserError(f"size must be above {len(SPECIAL)}, the number of special tokens, got {size}")
        counts = count_words(captions)
        if not counts:
            raise UserError("the captions hold no words: there is nothing to learn a vocabulary from")
        letters = alphabet(counts, size - len(SPECIAL))
        joined = join_pieces(counts, letters, size - len(SPECIAL) - len(letters))
        return cls(SPECIAL + letters + joined)

    def __len__(self):
        return len(self.words)

    def encode(self, text, length=None):
        """The ids of [CLS], the pieces of the text, [SEP]; with a `length`, cut before [SEP] and padded to it."""
        if length is not None and length < 2:
            raise ValueError(f"length must be at least 2, for [CLS] and [SEP], got {length}")
        ids = [self.cls_id]
        for chunk in split_spaces(text):
            ids += self.cache[chunk] if chunk in self.cache else self.encode_chunk(chunk)
        if length is None:
            return ids + [self.sep_id]
        ids = ids[: length - 1] + [self.sep_id]
        return ids + [self.pad_id] * (length - len(ids))

    def encode_chunk(self, chunk):
        """The ids of the text between two spaces, which are also put into the cache."""
        ids = []
        for word in split_words(chunk):
            ids += self.encode_word(word)
        if len(self.cache) < LARGEST_CACHE:
            self.cache[chunk] = ids
        return ids

    def encode_word(self, word):
        """Cut off the longest piece in the vocabulary, then the longest of the rest, ...; [UNK] where nothing fits."""
        if len(word) > LONGEST_WORD:
            return [self.unk_id]
        ids, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            for end in range(len(word), start, -1):
                if mark + word[start:end] in self.ids:
                    break
            else:
                return [self.unk_id]
            ids.append(self.ids[mark + word[start:end]])
            start = end
        return ids

    def decode(self, ids):
        """Text as BERT's decoder writes it: pieces joined, no space before . , ? and !, no [PAD], [CLS] or [SEP]."""
        words = []
        for i in map(int, ids):
            if not 0 <= i < len(self):
                raise ValueError(f"an id must lie in [0, {len(self)}), the size of the vocabulary, got {i}")
            if i not in (self.pad_id, self.cls_id, self.sep_id):
                words.append(self.words[i])
        text = " ".join(words).replace(" ##", "")
        return re.sub(r" ([.,?!])", r"\1", text)


def is_special(word):
    """Whether masking must never hide or produce this word."""
    return word in SPECIAL or re.fullmatch(r"\[unused\d+\]", word) is not None


def check_vocabulary(words, source):
    """Raise a UserError unless these can be the words of a BERT vocabulary."""
    if not words:
        raise UserError(f"{source}: a vocabulary must hold words, one a line, but this is empty")
    line_of = {}
    for line, word in enumerate(words, 1):
        if not isinstance(word, str) or word.split() != [word]:
            raise UserError(f"{source}: line {line} must hold one word, got {quoted(word)}")
        if word in line_of:
            raise UserError(f"{source}: line {line} repeats {quoted(word)} of line {line_of[word]}; remove one of them")
        line_of[word] = line
    missing = [word for word in SPECIAL if word not in line_of]
    if missing:
        raise UserError(f"{source}: a vocabulary must hold {' '.join(SPECIAL)}, but {' '.join(missing)} is missing")
    if words[0] != "[PAD]":
        raise UserError(f"{source}: [PAD] must be on line 1 (id 0), but it is on line {line_of['[PAD]']}")


def trim(tokens):
    """Cut off the columns at the end of tokens (n, L) that are padding in every row. A [PAD] between words stays."""
    used = (tokens != 0).any(dim=0).nonzero()
    return tokens[:, : int(used.max()) + 1 if len(used) else 0]


# --- Learning a vocabulary ---


def count_words(captions):
    """How often each word occurs, special tokens and overlong words left out."""
    chunks = Counter(itertools.chain.from_iterable(map(split_spaces, captions)))
    counts = Counter()
    for chunk, times in chunks.items():
        for word in split_words(chunk):
            if word not in SPECIAL and len(word) <= LONGEST_WORD:
                counts[word] += times
    return counts


def alphabet(counts, room):
    """The most frequent characters that fit into `room`, with their ## forms where they may continue a word."""
    letters = Counter()
    for word, times in counts.items():
        for c in word:
            letters[c] += times
    pieces = []
    for c in sorted(letters, key=lambda c: (-letters[c], c)):
        continues_a_word = split_words("a" + c) == ["a" + c]
        forms = [c, "##" + c] if continues_a_word else [c]
        if len(pieces) + len(forms) > room:
            break
        pieces += forms
    return sorted(pieces)


def join_pieces(counts, letters, room):
    """Up to `room` longer pieces in the order found: each step joins the pair of neighbours that occurs most often."""
    letters, words = set(letters), []
    for word, times in counts.items():
        pieces = [word[0], *("##" + c for c in word[1:])]
        if letters.issuperset(pieces):  # the other words will be [UNK]
            words.append((pieces, times))
    pairs, places = count_pairs(words)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)

    found = {}  # a dict and not a list: two different pairs may join into the same piece
    while heap and len(found) < room:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:  # an outdated count; the new one is in the heap as well
            continue
        if count > -2:  # a pair that occurs once says nothing about the language
            break
        joined = pair[0] + pair[1].removeprefix("##")
        found[joined] = True
        for changed, difference in join_everywhere(pair, joined, words, places).items():
            if difference:
                pairs[changed] += difference
                heapq.heappush(heap, (-pairs[changed], changed))
    return list(found)


def count_pairs(words):
    """From [(pieces, times)]: how often two pieces are neighbours, and in which of the words."""
    pairs, places = Counter(), defaultdict(set)
    for place, (pieces, times) in enumerate(words):
        for pair in zip(pieces, pieces[1:]):
            pairs[pair] += times
            places[pair].add(place)
    return pairs, places


def join_everywhere(pair, joined, words, places):
    """Replace the pair in all words (`words` and `places` are edited). Returns how each pair's count changes."""
    change = Counter()
    for place in places.pop(pair):
        old, times = words[place]
        new = join_pair(old, pair, joined)
        words[place] = new, times
        for neighbours in zip(old, old[1:]):
            change[neighbours] -= times
        for neighbours in zip(new, new[1:]):
            change[neighbours] += times
            places[neighbours].add(place)
    return change


def join_pair(pieces, pair, joined):
    """The pieces of one word with every occurrence of the pair replaced by the joined piece."""
    new, i = [], 0
    while i < len(pieces):
        together = tuple(pieces[i : i + 2]) == pair
        new.append(joined if together else pieces[i])
        i += 2 if together else 1
    return new
