"""Words out of a language model's answer: what is clear is read, what is not is refused with its line."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from cacl.errors import InputError, InputTypeError, expected, quoted

_THOUGHT = r"(think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad)"
_TAGS = r"</?(?:answer|output|result|final|words|ul|ol|li|p|b|i|strong|em|code|pre|div|span|br)\b[^<>]*>"
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[ \t]*[\w+-]*[ \t]*\n(.*?)(?:^[ \t]*(?:```|~~~)[ \t]*$|\Z)", re.M | re.S)
_BULLET = re.compile(
    r"^(\s*)(?:\(?\d{1,3}\s*[.):](?!\d)|(?:[ivx]{1,4}|[a-z])[.)](?=\s)|[•·・‣⁃●▪◦–—]|-(?!-)|[*+](?=\s))\s*"
    r"(?:\[[ x]?\]\s+)?",
    re.I,
)
_RULE = re.compile(r"[\s|:+-]*-[\s|:+-]*")
_APART = re.compile(r"\s+(?:-{1,2}|[–—→=]>?)\s+|\s*:\s+|\t\s*")
"""What stands between a word and what is said of it."""
_NUMBERED = re.compile(r"(?:word|background|item|object|thing)?\s*#?\s*\d{1,3}", re.I)
_WORD = re.compile(r"(?=.*[^\W\d_])\w[\w '’.&+-]*")
_PROSE = re.compile(
    r"\b(?:here|are|is|was|were|be|been|these|this|those|that|which|what|where|when|how|who|why|i|i['’](?:m|ll)|you|your|we|"
    r"my|me|it|its|it['’]s|they|them|their|he|she|his|her|hope|helps|let|know|sure|certainly|okay|please|thanks|may|"
    r"might|will|would|should|often|usually|commonly|typically|frequently|because|since|if|have|has|had|not|can['’]t|by|"
    r"ordered|words|list|following|sorry|copy code|(?:thought|reasoned) for|searched)"
    r"(?![\w'’-])|以[上下]|如[下需]|希望|です|ます",
    re.I,
)
"""Words of sentences, and of the windows that answers are copied from, which no name of a thing has."""
_SEVERAL = re.compile(r"\b(?:or|such as|includ(?:e|es|ing)|probably|e\.g)(?![\w'’-])|(?<=[a-z])[和与與及等とや]", re.I)
"""What makes a name of several, or of more than a name."""
_NOTHING = (
    "none", "null", "nothing", "etc", "and so on", "so on", "yes", "ok", "gladly", "of course", "no problem", "done",
    "cheers", "assistant", "好的", "はい",
)  # fmt: skip
_LABELS = re.compile(
    r"(?:\b(?:words?|user|assistant|answer|final|list|output|result|notes?|backgrounds?|objects?)\b\s*)+", re.I
)
"""Words of titles and of what stands before a list."""
_NUMBER = re.compile(r"^[ \t]*#?(\d{1,2})(?:[ \t]*[-,][ \t]*|[ \t]+)(?=[^\W\d_])", re.M)
"""What may number a line, or begin a name: 2 story house."""
_END = re.compile(r"(?:<\|[^<>|]*\|>|</s>|<end_of_turn>)\Z")
"""A model's own mark at the end of its answer."""
_COLUMNS = (
    "word", "words", "term", "thing", "object", "name", "item", "background", "background word", "noun", "english",
)  # fmt: skip


def read_words(answer: str) -> tuple[str, ...]:
    """The words of an answer in lower case, each once.

    Raises:
        ValueError: if no word is found, or a line may be a word or not; shows the line.
    """
    if not isinstance(answer, str):
        raise InputTypeError(f"Expected argument `answer` to be a text, but got {type(answer).__name__}.")
    text = _without_thoughts(_plain(answer))
    if len(text) > 5000:
        raise expected("answer", "a list of words", f"a text of {len(text)} characters")
    text = _block(text)
    words = _of_json(text)
    if words is None:
        words = _of_lines(text)
    found = tuple(dict.fromkeys(word.lower() for word in words))
    if not found:
        raise expected("answer", "a list of words", quoted(answer))
    return found


def _unclear(line: object) -> InputError:
    return expected("answer", "a list of words", f"something unclear: {quoted(line)}")


def _plain(answer: str) -> str:
    """In the letters, digits and signs that the rest knows."""
    text = re.sub(r"[\u2460-\u2487\u2776-\u2793]\s*", "\n- ", html.unescape(answer))  # numbers in circles, brackets
    text = re.sub(r"(?<![^\s；;，。])[一二三四五六七八九十]{1,2}、", "\n- ", text)
    text = re.sub("[\u00b9\u00b2\u00b3\u2070-\u2079]", "", re.sub(r"(?<=\w)\u3000+(?=\w)", ", ", text))  # of footnotes
    text = re.sub("(?<=\\d)\ufe0f?\u20e3", ".", text)  # of a key
    text = unicodedata.normalize("NFKC", "\n".join(text.replace("：", ": ").splitlines()))
    text = re.sub(r"[」』]\s*[「『]", ", ", text.replace("、", ", ").replace("。", "."))
    text = re.sub("[\u200b\u2060\ufeff\ufe0f]", "", text)
    return "".join(c for c in text if c == "\u00b7" or unicodedata.category(c) != "So" or c in "●▪◦")


def _without_thoughts(text: str) -> str:
    text = re.sub(rf"<{_THOUGHT}\b[^<>]*>.*?</\1\s*>", "\n", text, flags=re.I | re.S)
    text = re.split(rf"</{_THOUGHT}\s*>", text, flags=re.I)[-1]  # whose beginning is not part of the answer
    text = text.rstrip()
    while end := _END.search(text):
        text = text[: end.start()].rstrip()
    marked = (line for line in text.splitlines() if "<|" in line or "assistantfinal" in line)  # of a model's own
    cut = re.search(rf"<{_THOUGHT}\b.*", text, re.I)  # which has no end
    if line := cut[0] if cut else next(marked, ""):
        raise _unclear(line)
    return re.sub(_TAGS, "\n", text, flags=re.I)


def _block(text: str) -> str:
    """What is in the one code block, or all of it."""
    blocks = _FENCE.findall(text)
    if len(blocks) > 1:
        raise expected("answer", "a list of words", f"{len(blocks)} code blocks")
    return blocks[0] if blocks else text.replace("```", "")


def _of_json(text: str) -> list[str] | None:
    """The words of a list or an object of JSON; None where there is none."""
    if text.count("[") > text.count("]"):
        raise _unclear(" ".join(text.split()))
    if not (match := re.search(r"^[ \t]*(?:\w+[ \t]*=[ \t]*)?([\[{].*[\]}])[ \t]*;?[ \t]*$", text, re.S | re.M)):
        return None
    try:
        value: Any = json.loads(match[1])
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        lists = [each for each in value.values() if isinstance(each, list)]
        numbered = all(str(key).strip().isdigit() for key in value)
        value = list(value.values()) if numbered else lists[0] if len(lists) == 1 else None
    if isinstance(value, list):
        value = [_of_entry(each) if isinstance(each, dict) else each for each in value]
    if not isinstance(value, list) or not all(isinstance(each, str) and _is_word(each.strip()) for each in value):
        raise _unclear(" ".join(match[1].split()))
    return [each.strip() for each in value]


def _of_entry(entry: dict[str, object]) -> object:
    named = [value for key, value in entry.items() if key.lower() in _COLUMNS]
    return named[0] if len(named) == 1 else next(iter(entry.values())) if len(entry) == 1 else None


def _of_lines(text: str) -> list[str]:
    text = re.sub(r"(`|\*\*|__)[ \t]+\1", r"\1, \1", text)
    text = re.sub(r"\*\*|__|`", "", _bullets_apart(_numbers_marked(text)))
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text)]
    lines = [line for line in map(str.rstrip, text.splitlines()) if re.search(r"\w", line) or "|" in line]
    lines = [line for line in lines if not re.match(r"\s*#{1,6}\s", line)]
    if sum("|" in line for line in lines) > 1 or any(line.strip().startswith("|") for line in lines):
        return _of_table(lines)
    if lines and "," in lines[0] and {piece.lower() for piece in _pieces(lines[0])} & {*_COLUMNS}:  # of CSV
        raise _unclear(lines[0].strip())
    bulleted = [match for line in lines if (match := _BULLET.match(line))]
    if bulleted:
        for match in bulleted:
            if len(match[1]) >= len(bulleted[0][1]) + 2:  # of a word, or a word of a group
                raise _unclear(match.string.strip())
        numbered = [match[0].strip(" (")[0].isdigit() for match in bulleted]
        other = numbered.index(False) if False in numbered else 0
        if other and True in numbered[other:]:  # said of what is numbered
            raise _unclear(bulleted[other].string.strip())
    dotted = [line.endswith(".") for line in lines if not _BULLET.match(line)]
    found: list[str] = []
    ended = apart = ""
    places: list[bool] = []
    for line in lines:
        match = _BULLET.match(line)
        content = line[match.end() :] if match else line.strip()
        words = _of_line(content, bulleted=match is not None, alone=len(lines) == 1)
        if words is None and match is None:
            ended = line if found else ""
        elif words is None or ended or (match is None and (bulleted or (line.endswith(".") and not all(dotted)))):
            raise _unclear((ended or line).strip())
        else:
            found += words
            places.append(line.strip() in paragraphs)
            apart = apart or line if places[-1] else apart
    if not bulleted and apart and not all(places):  # a title, or a farewell
        raise _unclear(apart)
    return found


def _numbers_marked(text: str) -> str:
    """Numbers before words, where they count the lines, as bullets."""
    numbers = [int(number) for number in _NUMBER.findall(text)]
    return _NUMBER.sub("- ", text) if len(numbers) > 1 and numbers == [*range(1, len(numbers) + 1)] else text


def _bullets_apart(text: str) -> str:
    """Each bullet and number of a list on a line of its own."""
    text = re.sub(r"(?<=\S)\s+(?=[•●▪]\s)", "\n", text)
    rows = text.splitlines()
    return "\n".join(
        re.sub(r"(?<=\S)\s+(?=\(?\d{1,2}[.)]\s)", "\n", row) if re.match(r"\s*\(?1[.)]\s", row) else row for row in rows
    )


def _of_line(line: str, *, bulleted: bool, alone: bool) -> list[str] | None:
    """The words of one line; None for a sentence."""
    line = re.sub(r"(?<!^)\([^()]*\)" if alone else r"\([^()]*\)", "", line).strip(' \t"*_`')
    if not line or (line.endswith(":") and not bulleted) or (_LABELS.fullmatch(line) and not bulleted):
        return None
    head, *rest = _APART.split(line, maxsplit=1)
    if rest and _NUMBERED.fullmatch(_bare(head)):
        return _of_line(rest[0], bulleted=bulleted, alone=alone)
    if rest:
        if (
            bulleted
            and _is_word(_bare(head))
            and head.isascii()
            and not (_number(rest[0]) or re.search("[a-zA-Z]", rest[0]))
        ):
            return [_bare(head)]  # and what it is called in another script
        said = _pieces(rest[0])
        words = said if all(map(_is_word, said)) and not rest[0].endswith(("!", "?")) else []
        colon = ":" in line[len(head) : len(line) - len(rest[0])]
        if _LABELS.fullmatch(_bare(head)) or (alone and not bulleted and colon):
            return _listed(rest[0], bulleted=True, alone=True) if words else None
        if len(words) > 1 or _APART.search(rest[0]) or (colon and words and (not bulleted or " " not in words[0])):
            raise _unclear(line)
        head = _bare(head)
        if colon and not bulleted and _number(rest[0]):  # a count
            raise _unclear(line)
        if _is_word(head):
            return [head]
        _check_sentence(line)
        return None
    return _listed(head, bulleted=bulleted, alone=alone)


def _listed(line: str, *, bulleted: bool, alone: bool) -> list[str] | None:
    """Words with commas between them; None for a sentence."""
    pieces = _pieces(line)
    if _SEVERAL.search(line) and not _PROSE.search(line):
        raise _unclear(line)
    if alone and pieces and " and " in pieces[-1] and not any(piece.startswith("and ") for piece in pieces):
        pieces[-1:] = pieces[-1].split(" and ")
    if (
        alone and not bulleted and len(pieces) == 1 and len(line.split()) > 3 and _is_word(pieces[0])
    ):  # words with nothing between them?
        raise _unclear(line)
    pieces = [piece for each in pieces if (piece := re.sub(r"^and\s+", "", each)).lower() not in _NOTHING]
    ends = not bulleted and line.endswith(("!", "?", ".")) and len(pieces) == 1 and len(line.split()) > 2
    if not ends and all(map(_is_word, pieces)):
        return pieces
    _check_sentence(line)
    return None


def _check_sentence(line: str) -> None:
    """Require what is no word to be a sentence: anything else might have one in it."""
    if not (line.endswith((".", "!", "?", ":")) or _PROSE.search(line) or len(line.split()) > 5):
        raise _unclear(line)


def _pieces(line: str) -> list[str]:
    separated = re.split(r"[,;]|\s\|\s", line.strip("[](){}"))
    return [piece for each in separated if (piece := _bare(each))]


def _bare(text: str) -> str:
    """Without the marks around it."""
    return text.strip(" \t.\"'*_[]《》〈〉【】\u2018\u2019\u201c\u201d«»「」『』…")


def _is_word(text: str) -> bool:
    return len(text.split()) <= 5 and "  " not in text and _WORD.fullmatch(text) is not None and not _PROSE.search(text)


def _of_table(lines: Sequence[str]) -> list[str]:
    rows = [[_bare(cell) for cell in line.strip().strip("|").split("|")] for line in lines if "|" in line]
    ruled = [line for line in lines if "|" in line]
    rule = next((i for i, line in enumerate(ruled) if _RULE.fullmatch(line)), None)
    header = rows[rule - 1] if rule else []
    body = rows if rule is None else rows[rule + 1 :]
    for line in lines:
        if "|" not in line and _of_line(line.strip(), bulleted=False, alone=False) is not None:
            raise _unclear(line.strip())
    columns = [[row[c] if c < len(row) else "" for row in body] for c in range(max(map(len, rows)))]
    named = [c for c, name in enumerate(header) if name.lower() in _COLUMNS]
    if len(named) != 1:
        named = [c for c, column in enumerate(columns) if not all(_number(cell) for cell in column)]
    if len(named) != 1:
        raise _unclear(ruled[0].strip())
    words = columns[named[0]]
    for word, line in zip(words, _after(ruled, rule), strict=True):
        if not _is_word(word):
            raise _unclear(line.strip())
    return words


def _number(cell: str) -> bool:
    return not re.search(r"[^\W\d_]", cell)


def _after(lines: Sequence[str], rule: int | None) -> Iterable[str]:
    return lines if rule is None else lines[rule + 1 :]
