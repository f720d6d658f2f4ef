"""Published sets that reward models are measured on, read into three plain forms.

A reader is a pure function from one record of a set's file to the items that it holds: pairs,
prompts with samples that are right or wrong, or solutions with step labels (`process_sets`). It
takes what the file says as it is, and raises a ValueError naming the field where the file is of
another form. To add a set is to write its reader and to name it in `PAIRS` or `SAMPLES`.
"""

import math
from collections.abc import Mapping, Sequence

from rlhf_jax.data.examples import first_field, flag, pick
from rlhf_jax.data.plain_forms import (
    Pair,
    Prompt,
    Reader,
    Samples,
    bit,
    both_named,
    category,
    names_second,
    ordered,
    read_conversation,
    read_list,
    read_prompt,
    read_texts,
    shared_start,
    turned,
    two,
)
from rlhf_jax.data.sources import Record
from rlhf_jax.text.chat_template import Message
from rlhf_jax.text.template import split_dialogue


def pairs(record: Record) -> list[Pair]:
    """``prompt`` (text or messages), ``chosen``, ``rejected``; category under ``category``,
    ``subset`` or ``domain``, ``tie``, ``models``, where there are any.

    Without ``prompt``, the two are whole dialogues: messages, or text in the form of HH-RLHF.
    `chosen` and `rejected` that are messages repeat the prompt and end in the answer, as in
    UltraFeedback's binarised form.
    """
    better, worse = record.get("chosen"), record.get("rejected")
    if "prompt" not in record and isinstance(better, str) and isinstance(worse, str):
        return [Pair(*split_dialogue(better, worse), category(record))]
    (before, good), (also_before, bad) = (
        read_conversation(record, name) for name in ("chosen", "rejected")
    )
    if "prompt" in record:
        prompt = read_prompt(record, "prompt")
    else:
        prompt = shared_start(before, also_before)
    models = record.get("models")
    return [
        Pair(
            prompt,
            good,
            bad,
            category(record),
            tie=flag(record, "tie"),
            models=None if models is None else two(models, "models"),
        )
    ]


def reward_bench(record: Record) -> list[Pair]:
    """RewardBench (Lambert et al. 2024, https://arxiv.org/abs/2403.13787).

    The published sections weigh subsets by the size of the sets they came from; here a section's
    accuracy is that of its pairs.
    """
    subset = pick(record, ("subset",))
    models = [record.get(name) for name in ("chosen_model", "rejected_model")]
    section = _SECTIONS.get(subset)
    return [
        Pair(
            read_prompt(record, "prompt"),
            pick(record, ("chosen",)),
            pick(record, ("rejected",)),
            {"subset": subset} | ({"section": section} if section else {}),
            # "human" and "unknown" are no models whose rank means something.
            models=tuple(models) if all(m and m not in _NOBODY for m in models) else None,
        )
    ]


_NOBODY = ("human", "unknown")
_SECTIONS = {
    **dict.fromkeys(
        (
            "alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy",
            "mt-bench-med",
        ),
        "chat",
    ),
    **dict.fromkeys(
        (
            "mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst",
            "llmbar-adver-GPTOut", "llmbar-adver-manual",
        ),
        "chat-hard",
    ),
    **dict.fromkeys(
        (
            "refusals-dangerous", "refusals-offensive", "xstest-should-refuse",
            "xstest-should-respond", "donotanswer",
        ),
        "safety",
    ),
    **dict.fromkeys(
        (
            "math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust",
        ),
        "reasoning",
    ),
}  # fmt: skip


def reward_bench_2(record: Record) -> list[Samples]:
    """RewardBench 2 (Malik et al. 2025, https://arxiv.org/abs/2506.01937): best of four.

    Its accuracy is the best-of-K value at K, the number of completions. The subset Ties has many
    right ones and a published score of its own, of which the AUC within prompts is the part that is
    computed here.
    """
    right, wrong = (read_texts(record, name) for name in ("chosen", "rejected"))
    return [
        Samples(
            read_prompt(record, "prompt"),
            [*right, *wrong],
            [True] * len(right) + [False] * len(wrong),
            {"subset": pick(record, ("subset",))},
        )
    ]


def ppe_human(record: Record) -> list[Pair]:
    """PPE's human preferences (Frick et al. 2024, https://arxiv.org/abs/2410.14872)."""
    winner = pick(record, ("winner",))
    if winner not in ("model_a", "model_b") and not winner.startswith("tie"):
        raise ValueError(f"winner={winner!r}; wanted model_a, model_b or tie")
    categories = {"language": record["language"]} if record.get("language") else {}
    flags = ("hard_prompt", "easy_prompt", "if_prompt", "math_prompt", "is_code")
    for name in flags:
        if name in record:
            categories[name] = name if record[name] else f"not {name}"
    answers = pick(record, ("response_1",)), pick(record, ("response_2",))
    models = pick(record, ("model_a",)), pick(record, ("model_b",))
    swap = winner == "model_b"
    return [
        Pair(
            read_prompt(record, "prompt"),
            *turned(answers, swap),
            categories,
            tie=winner.startswith("tie"),
            models=turned(models, swap),
        )
    ]


def ppe_correctness(record: Record) -> list[Samples]:
    """PPE's best-of-K sets: ``response_1`` to ``response_K`` and ``scores``, one of them each."""
    count = sum(name.startswith("response_") for name in record)
    scores = read_list(record, "scores")
    correct = [one[0] if isinstance(one, list) and one else one for one in scores]
    if not count or len(correct) != count:
        raise ValueError(f"{len(correct)} scores for {count} fields response_*")
    return [
        Samples(
            read_prompt(record, "prompt"),
            [pick(record, (f"response_{i + 1}",)) for i in range(count)],
            [bit(one, "scores") for one in correct],
            {"generator": record["model_name"]} if record.get("model_name") else {},
        )
    ]


def rm_bench(record: Record) -> list[Pair]:
    """RM-Bench (Liu et al. 2024, https://arxiv.org/abs/2410.16184): three styles of both answers.

    The styles are concise, detailed, and detailed with markdown. A pair is "hard" where the better
    answer has less style than the worse one, "easy" where it has more, else "normal".
    """
    better, worse = (read_texts(record, name) for name in ("chosen", "rejected"))
    if len(better) != len(worse):
        raise ValueError(f"{len(better)} chosen but {len(worse)} rejected; wanted as many styles")
    prompt, part = read_prompt(record, "prompt"), pick(record, ("domain",))
    domain = part.partition("-")[0]  # safety-refuse and safety-response are one of four
    levels = {-1: "hard", 0: "normal", 1: "easy"}
    return [
        Pair(
            prompt,
            good,
            bad,
            {"domain": domain, "level": levels[(i > j) - (i < j)]}
            | ({"part": part} if part != domain else {}),
        )
        for i, good in enumerate(better)
        for j, bad in enumerate(worse)
    ]  # fmt: skip


def judgebench(record: Record) -> list[Pair]:
    """JudgeBench (Tan et al. 2024, https://arxiv.org/abs/2410.12784)."""
    label, source = pick(record, ("label",)), pick(record, ("source",))
    if label not in ("A>B", "B>A", "A=B"):
        raise ValueError(f"label={label!r}; wanted A>B, B>A or A=B")
    answers = pick(record, ("response_A",)), pick(record, ("response_B",))
    kinds = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")
    kind = next((kind for kind in kinds if source.startswith(kind)), source)
    categories = {"kind": kind, "source": source}
    if record.get("response_model"):
        categories["model"] = record["response_model"]
    two_answers = turned(answers, label == "B>A")
    return [Pair(read_prompt(record, "question"), *two_answers, categories, tie=label == "A=B")]


def llmbar(record: Record) -> list[Pair]:
    """LLMBar (Zeng et al. 2023, https://arxiv.org/abs/2310.07641)."""
    swap = names_second(record, "label", first=1)
    answers = pick(record, ("output_1",)), pick(record, ("output_2",))
    return [Pair(read_prompt(record, "input"), *turned(answers, swap), category(record))]


def autoj(record: Record) -> list[Pair]:
    """Auto-J's pairs (Li et al. 2023, https://arxiv.org/abs/2310.05470).

    The label is 0 where the first is better, 1 where the second is, 2 for a tie.
    """
    label = record.get("label")
    answers = pick(record, ("response 1",)), pick(record, ("response 2",))
    swap = label != 2 and names_second(record, "label", first=0)
    categories = {"scenario": pick(record, ("scenario",))} if "scenario" in record else {}
    return [
        Pair(read_prompt(record, "prompt"), *turned(answers, swap), categories, tie=label == 2)
    ]  # fmt: skip


def pandalm(record: Record) -> list[Pair]:
    """PandaLM's test set (Wang et al. 2023, https://arxiv.org/abs/2306.05087).

    Three people say 1, 2, or 0 for a tie; most votes decide, and three different ones are a tie.
    """
    votes = [record.get(f"annotator{i}") for i in (1, 2, 3)]
    if any(vote not in (0, 1, 2) for vote in votes):
        raise ValueError(f"annotators say {votes}; wanted 0, 1 or 2 of each")
    label = max((0, 1, 2), key=lambda one: (votes.count(one), one == 0))
    answers = pick(record, ("response1",)), pick(record, ("response2",))
    models = pick(record, ("cmp_key",)).split("_")
    named = two(models, "cmp_key") if len(models) == 2 else None
    given = pick(record, ("input",)) if record.get("input") else ""
    task = pick(record, ("instruction",))
    return [
        Pair(
            f"{task}\n\n{given}" if given else task,
            *turned(answers, label == 2),
            {"task": record["motivation_app"]} if record.get("motivation_app") else {},
            tie=label == 0,
            models=None if named is None else turned(named, label == 2),
            votes=tuple(votes),
        )
    ]


def ultrafeedback(record: Record) -> list[Pair]:
    """UltraFeedback as published (Cui et al. 2023, https://arxiv.org/abs/2310.01377).

    Every two of the ``completions`` of an ``instruction`` by ``overall_score``; equals are ties.
    """
    found = []
    for one in read_list(record, "completions"):
        score = one.get("overall_score") if isinstance(one, Mapping) else None
        plain = isinstance(score, int | float) and not isinstance(score, bool)
        if not plain or not math.isfinite(score):
            raise ValueError(f"completions hold overall_score={score!r}; wanted a finite number")
        found.append((score, pick(one, ("response",)), one.get("model", "")))
    prompt = read_prompt(record, "instruction")
    categories = {"source": record["source"]} if record.get("source") else {}
    return [
        Pair(prompt, a[1], b[1], categories, tie=a[0] == b[0], models=both_named(a[2], b[2]))
        for a, b in ordered(sorted(found, key=lambda one: -one[0]))
    ]


def ranked(record: Record) -> list[Pair]:
    """Replies in a list ``output``, best first, to ``instruction`` after the turns of ``history``.

    The form of OpenAssistant's ranked replies in LLaMA-Factory.
    """
    prompt: list[Message] = []
    for turn in record.get("history") or []:
        asked, said = two(turn, "history")
        prompt += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    parts = [pick(record, (name,)) for name in ("instruction", "input") if record.get(name)]
    task = "\n".join(parts)
    if not task:
        raise ValueError("no text under instruction")
    asked: Prompt = [*prompt, {"role": "user", "content": task}] if prompt else task
    return [Pair(asked, good, bad) for good, bad in ordered(read_texts(record, "output"))]


def samples(record: Record) -> list[Samples]:
    """``prompt``, ``completions``, ``correct``: one bit each; or one ``completion`` and ``label``.

    Records of one completion each are put together by their prompts. Other names that are known:
    ``question`` or ``problem``; ``responses``, ``solution``; ``is_correct``.
    """
    prompt = read_prompt(record, first_field(record, ("prompt", "question", "problem")))
    if "completions" in record or "responses" in record:
        texts = read_texts(record, first_field(record, ("completions", "responses")))
        bits = [bit(one, "correct") for one in read_list(record, "correct")]
    else:
        texts = [pick(record, ("completion", "solution"))]
        name = first_field(record, ("label", "is_correct"))
        bits = [bit(record[name], name)]
    if len(texts) != len(bits):
        raise ValueError(f"{len(bits)} labels for {len(texts)} completions")
    return [Samples(prompt, texts, bits, category(record))]


PAIRS: Mapping[str, Reader] = {
    "pairs": pairs,
    "reward_bench": reward_bench,
    "ppe_human": ppe_human,
    "rm_bench": rm_bench,
    "judgebench": judgebench,
    "llmbar": llmbar,
    "autoj": autoj,
    "pandalm": pandalm,
    "ultrafeedback": ultrafeedback,
    "ranked": ranked,
}
SAMPLES: Mapping[str, Reader] = {
    "samples": samples,
    "reward_bench_2": reward_bench_2,
    "ppe_correctness": ppe_correctness,
}


def joined(found: Sequence[Samples]) -> list[Samples]:
    """Samples with those of one prompt put together, where records hold one completion each."""
    if any(len(one.completions) != 1 for one in found):
        return list(found)
    groups: dict[str, list[Samples]] = {}
    for one in found:
        groups.setdefault(repr(one.prompt), []).append(one)
    return [
        Samples(
            group[0].prompt,
            [one.completions[0] for one in group],
            [one.correct[0] for one in group],
            group[0].categories,
        )
        for group in groups.values()
    ]
