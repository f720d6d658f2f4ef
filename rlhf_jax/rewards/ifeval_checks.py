"""The 25 instructions of IFEval that a program can check, one function each.

Written from their published descriptions (Zhou et al., 2023, https://arxiv.org/abs/2311.07911,
table 1, and the argument names of the published prompts). Every function takes the response and
the instruction's arguments by name and says whether the response follows it.

Where we differ from the published program, which uses NLTK: sentences are counted by the rule of
`count_sentences`, words in capitals by a regular expression, keywords are plain text and no
patterns, and a response whose language cannot be told has not the wanted one (there it has; a
reward must not be had for "5"). Each function is linear in the length of the response.
"""

import json
import re
import threading
from collections.abc import Callable, Sequence

import langdetect
from langdetect.detector_factory import DetectorFactory, init_factory

DetectorFactory.seed = 0  # detection draws random numbers; now the same ones in every call
_LOADING = threading.Lock()
_LANGUAGE_TEXT = 10_000  # characters that the detector looks at

CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"\w+(?:[-'’.&]\w+)*")
_STOP = re.compile(r"(?<![.!?])[.!?]+[\"'”’)\]*_]*(?=\s|$)")
_ABBREVIATIONS = frozenset(
    ("mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "mt", "vs", "eg", "ie", "e.g", "i.e", "fig")
)


def _relation(found: int, relation: str, wanted: int) -> bool:
    if relation not in ("at least", "less than"):
        raise ValueError(f"relation={relation!r}; known: 'at least', 'less than'")
    return found >= wanted if relation == "at least" else found < wanted


def count_sentences(text: str) -> int:
    """Stops before a space or the end, and what is left after the last of them.

    The dot of an abbreviation or of an initial is none, nor is one that a small letter follows.

    >>> count_sentences("Dr. J. Doe came at 3.15 p.m. today! Really?! Yes")
    3
    """
    count, after = 0, 0
    for stop in _STOP.finditer(text):
        before = text[max(0, stop.start() - 20) : stop.start()].split()[-1:] or [""]
        word = before[0].lstrip("\"'“‘(*").lower()
        if stop.group().startswith(".") and (
            word in _ABBREVIATIONS or re.fullmatch(r"[a-z]", word)
        ):
            continue
        rest = text[stop.end() : stop.end() + 20].lstrip()
        if rest[:1].islower():
            continue
        count, after = count + 1, stop.end()
    return count + bool(_WORD.search(text, after))


def _language(text: str) -> str | None:
    with _LOADING:  # the profiles are loaded by the first call, which must be one thread's
        init_factory()
    try:
        return langdetect.detect(text[:_LANGUAGE_TEXT])
    except langdetect.LangDetectException:
        return None  # no letters in it


def _parts(text: str, mark: str) -> list[str] | None:
    """What stands between the marks; None if a part in the middle is empty."""
    parts = [part.strip() for part in text.split(mark)]
    middle = parts[1:-1]
    return None if "" in middle else [part for part in parts if part]


def keywords_existence(text: str, *, keywords: Sequence[str]) -> bool:
    return all(word.lower() in text.lower() for word in keywords)


def keywords_frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return _relation(text.lower().count(keyword.strip().lower()), relation, frequency)


def forbidden_words(text: str, *, forbidden_words: Sequence[str]) -> bool:
    return not any(
        re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words
    )


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _relation(text.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(text: str, *, language: str) -> bool:
    return _language(text) == language


def number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    return _relation(count_sentences(text), relation, num_sentences)


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Paragraphs stand between lines of three stars."""
    parts = _parts(text, "***")
    return parts is not None and len(parts) == num_paragraphs


def number_words(text: str, *, num_words: int, relation: str) -> bool:
    return _relation(len(_WORD.findall(text)), relation, num_words)


def nth_paragraph_first_word(
    text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """Here paragraphs stand between two line breaks; so many of them are not blank."""
    paragraphs = text.split("\n\n")
    if sum(bool(paragraph.strip()) for paragraph in paragraphs) != num_paragraphs:
        return False
    words = paragraphs[nth_paragraph - 1].split() if nth_paragraph <= len(paragraphs) else []
    if not words:
        return False
    word = re.split(r"[.,?!'\"]", words[0].lstrip("'\""), maxsplit=1)[0]
    return word.lower() == first_word.lower()


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    """Placeholders stand in square brackets, on one line."""
    count = 0
    for line in text.split("\n"):
        end = -1
        while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start)) >= 0:
            count += 1
    return count >= num_placeholders


def postscript(text: str, *, postscript_marker: str) -> bool:
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = patterns.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(pattern, text.lower()) is not None


def number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    """Lines that begin with a dash, or with one star."""
    lines = [line.lstrip() for line in text.split("\n")]
    bullets = [line for line in lines if re.match(r"-|\*[^*]", line)]
    return len(bullets) == num_bullets


def constrained_response(text: str) -> bool:
    return any(answer in text for answer in CONSTRAINED)


def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    """Text between stars, or between pairs of them, on one line."""
    single = re.findall(r"\*([^\n*]*)\*", text)
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(part.strip()) for part in single + double) >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """The splitter, and a number, before every section."""
    heads = re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)
    return len(heads) >= num_sections


def json_format(text: str) -> bool:
    """The whole response is JSON, in a fence or not."""
    body = re.sub(r"^```(?:json|Json|JSON)?|```$", "", text.strip()).strip()
    try:
        json.loads(body)
    except (ValueError, RecursionError):  # one too deep to be read is no answer
        return False
    return True


def title(text: str) -> bool:
    """<<a title>>"""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end and line[start:end].strip("<> \t"):
            return True
    return False


def two_responses(text: str) -> bool:
    """Two different ones with six stars between them."""
    parts = _parts(text, "******")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    words = [word for word in _TOKEN.findall(text) if word.isupper()]
    return _relation(len(words), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    return text.isupper() and _language(text) == "en"


def english_lowercase(text: str) -> bool:
    return text.islower() and _language(text) == "en"


def no_comma(text: str) -> bool:
    return "," not in text


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": keywords_existence,
    "keywords:frequency": keywords_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
    "startend:quotation": quotation,
}
