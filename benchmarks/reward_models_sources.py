"""Where the sets of `benchmarks.reward_models` come from, as the cards of its models say it."""

LICENCE = "Apache-2.0, as far as the licence of the data allows"
LIMITS = (
    "A study's model: tiny, from random weights, trained for a minute; it learnt surface features.",
    "English only, and texts like those of the one set that it was trained on.",
)
PROVENANCE = {
    "ukp": dict(
        origin="UKPConvArg1Strict (Habernal and Gurevych 2016), arguments of two debate portals; "
        "https://github.com/UKPLab/acl2016-convincing-arguments",
        annotators="crowd workers; how many for each pair is not in the files",
        aggregation="one choice for each pair, as the strict version of the set has it",
        licence="CC BY 4.0",
    ),
    "hh": dict(
        origin="HH-RLHF (Bai et al. 2022), the test sets of helpful-base and harmless-base: "
        "dialogues of people with a language model; https://github.com/anthropics/hh-rlhf and, "
        "for helpful-base, a copy in https://github.com/Linear95/DSP",
        annotators="people who talked with the model, for harmless-base to get harm out of it; "
        "how many is not in the files",
        aggregation="one choice between two replies",
        licence="MIT",
    ),
    "gsm8k": dict(
        origin="solutions of four GPT-3 models to test problems of GSM8K (Cobbe et al. 2021); "
        "https://github.com/openai/grade-school-math",
        annotators="no people: the final number is compared with the reference answer",
        aggregation="one verdict for each solution",
        licence="MIT",
    ),
    "prmbench": dict(
        origin="PRMBench (Song et al. 2025): solutions of PRM800K, and the same with mistakes that "
        "GPT-4o put in; https://github.com/ssmisya/PRMBench",
        annotators="GPT-4o names the steps that it spoilt; people filtered its work",
        aggregation="a step that is named is wrong, all others are right",
        licence="Apache-2.0; what it is derived from, PRM800K, is MIT",
    ),
    "bigbench_mistake": dict(
        origin="BIG-Bench Mistake (Tyen et al. 2023): reasoning of PaLM 2 on five tasks of "
        "BIG-Bench; https://github.com/WHGTyen/BIG-Bench-Mistake",
        annotators="people; how many for each trace is not in the files",
        aggregation="the first wrong step, one for each trace; later steps have no label",
        licence="Apache-2.0",
    ),
}
