"""Texts of many scripts on which two tokenizers are compared: sentences, random letters, random tokens.

Made anew each time from a fixed seed. Sentences show what is frequent, letters drawn from a script's blocks what is
rare, and tokens of the vocabulary written one after the other reach merges that neither would.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_SEED = 20261129
_LETTERS = 40  # lines of random letters of a script
_TOKENS = 60  # lines of random tokens of a script


@dataclass(frozen=True)
class Sample:
    """Texts of one kind. ordinary: what people write, so that a difference there is a fault of the export."""

    name: str
    texts: tuple[str, ...]
    ordinary: bool = True


#: Script -> ranges of its letters, and sentences.
_SCRIPTS: dict[str, tuple[Sequence[tuple[int, int]], Sequence[str]]] = {
    "Latin": (
        [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF)],
        [
            "Question: What is the capital of France?\nAnswer: Paris.",
            "Once upon a time, there was a small village by the sea; nobody's boats had ever left it.",
            "Größe, Maß und Übermut tun selten gut – so heißt es.",
            "Où est passé l'été ? Ça ne m'étonne guère, dit-elle.",
            "¿Dónde está el niño? Mañana comerá una piña.",
            "Zażółć gęślą jaźń. Příliš žluťoučký kůň úpěl ďábelské ódy.",
            "Tôi đang học tiếng Việt ở Hà Nội. İstanbul'da yağmur yağıyor.",
        ],
    ),
    "Cyrillic": ([(0x400, 0x52F)], ["Съешь же ещё этих мягких французских булок, да выпей чаю.", "Привіт, світе!"]),
    "Greek": ([(0x386, 0x3FF), (0x1F00, 0x1FBC)], ["Το ταξίδι αρχίζει σήμερα το πρωί.", "Ἐν ἀρχῇ ἦν ὁ λόγος."]),
    "Armenian and Georgian": ([(0x531, 0x586), (0x10D0, 0x10FF)], ["Բարեւ աշխարհ։", "გამარჯობა მსოფლიო."]),
    "Hebrew": ([(0x5D0, 0x5EA), (0x591, 0x5C7)], ["שלום עולם, מה שלומך היום?", "בְּרֵאשִׁית"]),
    "Arabic": ([(0x620, 0x6D3), (0x750, 0x77F)], ["مرحبا بالعالم، كيف حالك اليوم؟", "سلام دنیا، خوبی؟ ۱۲۳"]),
    "Devanagari": ([(0x900, 0x97F)], ["नमस्ते दुनिया, आप कैसे हैं?", "क्षत्रिय १२३४५"]),
    "Bengali, Tamil, Telugu": ([(0x980, 0x9FE), (0xB82, 0xBFA), (0xC00, 0xC7F)], ["ওহে বিশ্ব", "வணக்கம் உலகம்"]),
    "Thai and Lao": ([(0xE01, 0xE3A), (0xE3F, 0xE5B), (0xE81, 0xEDF)], ["สวัสดีชาวโลก วันนี้อากาศดี", "ສະບາຍດີ"]),
    "Ethiopic": ([(0x1200, 0x137C)], ["ሰላም ዓለም፤ እንደምን ነህ?"]),
    "Han": ([(0x4E00, 0x9FFF), (0x3400, 0x4DBF)], ["今天天气很好，我们去公园散步吧。", "臺灣的夏天很熱。"]),
    "Japanese": (
        [(0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FFF)],
        ["吾輩は猫である。名前はまだ無い。", "コーヒーを三杯ください！"],
    ),
    "Hangul": ([(0xAC00, 0xD7A3), (0x1100, 0x11FF)], ["안녕하세요, 세계! 오늘은 날씨가 좋습니다.", "그는 집에 갔다."]),
    "Combining marks": (
        [(0x300, 0x36F), (0x61, 0x7A), (0x20D0, 0x20F0)],
        ["e\u0301a\u0308o\u0302n\u0303", "Z\u0351\u036b"],
    ),
    "Punctuation and symbols": (
        [(0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E), (0xA1, 0xBF), (0x2010, 0x2BFF), (0x3001, 0x3030)],
        ["“Quoted” — ‘twice’… (a) [b] {c} <d>", "∀x∈ℝ: x²≥0 ⇒ √x² = |x| ± ε", "→ ← ↑ ↓ ✓ ✗ ★ € £ ¥ ₿ ½ ② Ⅷ"],
    ),
}

_CODE = (
    "def f(x):\n    return x**2 + 3.14159 * x - 1_000_000\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];  // 0xDEADBEEF\n}\n",
    "<div class=\"x\" id='y'>&nbsp;&lt;</div>\r\n",
    "SELECT name, COUNT(*) FROM t WHERE id >= 42 GROUP BY 1;",
    '{"key": [1, 2.5e-3, null, true], "path": "C:\\\\Users\\\\x"}',
    "git commit -m 'fix: #123' && make -j8 2>&1 | tee log.txt",
    "https://example.org/a?b=c&d=%20#e user@example.com 192.168.0.1",
    "x = {k: v for k, v in zip(a, b)}\n\n\n    \n\t\t# end",
    "let y = arr.map((z) => z?.id ?? -1); // naïve",
    "#include <vector>\ntemplate <class T> std::vector<T> g(T&& t) { return {t}; }",
)
_EMOJI = "😀😂🥰👍🎉🔥🐍🌍🚀🍕🏠🎵💡📚⚽🦄"
_JOINED = ("👩‍💻", "👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "🇫🇷", "1️⃣", "❤️", "☕️", "🧑🏿‍🚀")
_SPACES = " \t\n\r\u000b\u000c\u00a0\u1680\u2003\u2009\u2028\u202f\u205f\u3000\u0085"


def corpus(tokens: Sequence[str], specials: Sequence[str]) -> list[Sample]:
    """Samples for a vocabulary.

    tokens: what tokens stand for, as text. specials: names of tokens that are no text.
    """
    rng = np.random.default_rng(_SEED)
    samples = []
    for name, (ranges, sentences) in _SCRIPTS.items():
        drawn = [_letters(rng, ranges) for _ in range(_LETTERS)]
        own = [token for token in tokens if len(token) > 1 and all(_within(c, ranges) or c in " .,\n" for c in token)]
        samples.append(Sample(name, (*sentences, *drawn, *_strung(rng, own))))
    samples.append(Sample("Code", _CODE + tuple(code * 3 for code in _CODE)))
    samples.append(Sample("Digits", tuple(_digits(rng))))
    samples.append(Sample("White space", tuple(_spaced(rng))))
    samples.append(Sample("Emoji", tuple(_emoji(rng))))
    samples.append(Sample("Every token of several characters", tuple(t for t in tokens if len(t) > 1)))
    samples.append(Sample("All tokens mixed", tuple(_strung(rng, [t for t in tokens if t], 200))))
    everything = [_letters(rng, [(0x20, 0xD7FF), (0xF900, 0xFFFD)]) for _ in range(_LETTERS)]
    samples.append(Sample("Random, U+0020 to U+FFFD", tuple(everything), ordinary=False))
    for first, last in ((0x10000, 0x3FFFF), (0x40000, 0x10FFFF)):
        drawn = [_letters(rng, [(first, last)]) for _ in range(_LETTERS)]
        samples.append(Sample(f"Random, U+{first:X} to U+{last:X}", tuple(drawn), ordinary=False))
    private = [_letters(rng, [(0xE000, 0xF8FF), (0x61, 0x7A)]) for _ in range(_LETTERS)]
    samples.append(Sample("Private use", tuple(private), ordinary=False))
    named = [text for name in specials for text in (name, f"a{name}b", f"\n {name} {name}{name}.")]
    if named:
        samples.append(Sample("Names of special tokens", tuple(named), ordinary=False))
    return samples


def tokens_as_text(vocab: Mapping[int, bytes]) -> list[str]:
    """Of the tokens' bytes those that are whole characters."""
    texts = []
    for _, data in sorted(vocab.items()):
        try:
            texts.append(data.decode())
        except UnicodeDecodeError:
            continue
    return texts


def _within(character: str, ranges: Sequence[tuple[int, int]]) -> bool:
    return any(first <= ord(character) <= last for first, last in ranges)


def _letters(rng: np.random.Generator, ranges: Sequence[tuple[int, int]]) -> str:
    """Five words of one to eight letters, each range as likely as another."""
    words = []
    for _ in range(5):
        chosen = rng.integers(0, len(ranges), rng.integers(1, 9))
        words.append("".join(chr(rng.integers(ranges[r][0], ranges[r][1] + 1)) for r in chosen))
    return rng.choice([" ", "  ", "\n", ", "]).join(words)


def _strung(rng: np.random.Generator, tokens: Sequence[str], lines: int = _TOKENS) -> list[str]:
    """Lines of some ten tokens, half of them with spaces between."""
    if not tokens:
        return []
    drawn = (rng.integers(0, len(tokens), rng.integers(2, 16)) for _ in range(lines))
    return [("" if n % 2 else " ").join(tokens[i] for i in line) for n, line in enumerate(drawn)]


def _digits(rng: np.random.Generator) -> list[str]:
    lengths = [*range(1, 20), 50, 200]
    runs = ["".join(map(str, rng.integers(0, 10, n))) for n in lengths]
    return [*runs, *(f"a{r}b, {r}. -{r} {r[:2]}/{r[2:]}:{r}" for r in runs), "1,234,567.89", "2026-11-29T20:01:10Z"]


def _spaced(rng: np.random.Generator) -> list[str]:
    runs = [one * n for one in " \n\t" for n in (1, 2, 3, 4, 7, 8, 9, 16, 33)]
    mixed = ["".join(rng.choice(list(_SPACES), rng.integers(1, 12))) for _ in range(60)]
    return [*runs, *(f"a{run}b" for run in runs), *(f"word{run}word" for run in mixed), *mixed, ""]


def _emoji(rng: np.random.Generator) -> list[str]:
    single = ["".join(rng.choice(list(_EMOJI), rng.integers(1, 6))) for _ in range(40)]
    drawn = [_letters(rng, [(0x1F300, 0x1F64F), (0x1F680, 0x1F6C5), (0x1F900, 0x1F9FF)]) for _ in range(20)]
    return [*single, *_JOINED, *(f"Nice {e}{e} day {e}." for e in (*_JOINED, *single[:20])), *drawn]
