"""A trained model as a Hugging Face folder, which transformers loads with no code of ours.

    python -m rlhf_jax.export --workdir=RUN --output=DIR

What a run trained becomes what ``--what`` says:

    policy      ...ForCausalLM
    outcome     ...ForSequenceClassification with one label: the score of a text is the number at
                its last token, so texts end with the end-of-text token, as they did in training
    process     ...ForTokenClassification with one label: a score at the last token of each step
    value       the bare decoder (...Model) and value_head.safetensors: ``value.weight`` [1, D]
                and ``value.bias`` [1], whose product with the last hidden state is the value

A reward run with an outcome and a process head exports either; a head of another name, which serves
both, becomes the classifier of tokens, which scores every token as it does. ODIN's outcome model is
its quality head; length is dropped, as in a policy run. An advantage model's score is r − e, and a
classifier has no place for e: with ``--what=outcome`` r alone is written, which ranks the answers
to one prompt alike, and without it the run is refused.

An ensemble is written member by member, a folder each (``--member=0``, ...): whole models of the
same form, so its scores are the mean of theirs, or what `rlhf_jax.ops.ensemble` makes of them.

With ``--adapters`` the adapters of a run are written as they are, in PEFT's format, beside the name
of the model they were trained on. Else they are merged.

Tokenizer, chat template and generation settings are those that the run began with (its base/). A
reward model takes its card along, as README.md and card.json (see `rlhf_jax.card`).
``DIR`` can be the ``init_from`` of another run.
"""

import dataclasses
import json
import logging
import pathlib
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax import base_files, card, card_page, program, roles, run_folder
from rlhf_jax.mesh import ShardingRules, make_mesh
from rlhf_jax.models.config import DTYPES, ModelConfig
from rlhf_jax.models.families import architecture, family_of
from rlhf_jax.models.heads import QUALITY_HEAD, is_advantage, is_odin
from rlhf_jax.models.load import load_hf
from rlhf_jax.models.lora import merge_lora, partition
from rlhf_jax.models.members import member_of
from rlhf_jax.models.peft import is_adapter_folder, save_peft
from rlhf_jax.models.save import ROLES, check_empty, json_bytes, published_config, save_hf
from rlhf_jax.schema import closest, within
from rlhf_jax.text.tokenizer import Tokenizer, load_tokenizer
from rlhf_jax.training.checkpoint import check_newest
from rlhf_jax.types import Params

_log = logging.getLogger(__name__)


class Subject(NamedTuple):
    """What is exported.

    role: under which the run trained it.
    head: its scalar head in the run; "" for a policy.
    what: what it becomes.
    """

    role: str
    head: str
    what: str


def export(
    *,
    workdir: Annotated[str, "Folder of a run."],
    output: Annotated[str, "Folder to write; a new one, or empty."],
    what: Annotated[str, "policy, outcome, process or value; else what the run trained."] = "",
    dtype: Annotated[str, "float32, bfloat16 or float16 in place of the run's."] = "",
    adapters: Annotated[bool, "Write the adapters alone, for PEFT."] = False,
    base: Annotated[str, "With --adapters: the folder or name of the model they change."] = "",
    member: Annotated[int, "Which model of an ensemble, from 0 on."] = -1,
    pad_token_id: Annotated[int, "In place of the tokenizer's; -1 is none."] = -1,
    max_shard_size: Annotated[str, "Of one file of tensors."] = "5GB",
) -> None:
    """Writes a Hugging Face folder from a run's newest checkpoint.

    Raises:
        ValueError: for bad input, before any device is touched.
    """
    if dtype and dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype!r}{closest(dtype, DTYPES)}; known: {', '.join(DTYPES)}")
    with within(f"--output={output!r}"):
        check_empty(pathlib.Path(output))
    with within(f"--workdir={workdir!r}"):
        models = run_folder.read_models(workdir)
        check_newest(workdir)
    subject = find_subject(models, what)
    trained = models[subject.role]
    _check_member(trained, member)
    config = _exported(trained, subject)
    base = _adapters_base(workdir, config, base) if adapters else ""
    if pad_token_id >= config.vocab_size:
        raise ValueError(f"--pad_token_id={pad_token_id}; the model has {config.vocab_size} tokens")
    text = _tokenizer(workdir)
    token_ids = _token_ids(text, subject.what, pad_token_id)
    files = _files(workdir, text, subject.what, token_ids, changed_pad=pad_token_id >= 0)
    files |= _card(workdir, subject, dtype=dtype or trained.param_dtype, member=member)
    published = _published(workdir, config, subject)
    if published is not None:  # which knows its own
        changed = subject.what != "policy" or pad_token_id >= 0
        token_ids = {"pad_token_id": token_ids["pad_token_id"]} if changed and token_ids else {}
    # Raises what is wrong with them.
    published_config(config, subject.what, base=published, token_ids=token_ids)

    mesh, rules = make_mesh({"fsdp": -1}), ShardingRules()
    with jax.set_mesh(mesh):
        params = roles.load_role(workdir, subject.role, mesh, rules)
        if trained.members > 1:
            params = member_of(params, trained, member)
        params = _with_head(params, subject)
        if adapters:
            _check_base(params, config, base, mesh, rules)
            save_peft(output, params, config, subject.what, base=base, published=published,
                      dtype=dtype, files=files)  # fmt: skip
        else:
            # Base and adapters are added in the wider of their type and the one asked for.
            wide = {t: jnp.promote_types(t, dtype or t) for t in DTYPES}
            plain = merge_lora(jax.tree.map(lambda x: x.astype(wide[x.dtype.name]), params), config)
            save_hf(output, plain, dataclasses.replace(config, lora_rank=0), subject.what,
                    base=published, token_ids=token_ids, dtype=dtype, max_shard_size=max_shard_size,
                    files=files)  # fmt: skip
    _log.info("%s of %s in %s", subject.what, workdir, output)


def find_subject(models: dict[str, ModelConfig], what: str) -> Subject:
    """The role and head of a run that become `what`; what it trained where that is empty.

    Raises:
        ValueError: listing what the run can become.
    """
    trained = "policy" if "policy" in models else next(iter(models))
    possible = {}
    for role in (trained, "value"):
        heads = models[role].score_heads if role in models else ()
        for head in heads:
            if head in ROLES or len(heads) == 1:
                # A classifier of tokens has a constant, as all heads of other names have.
                become = head if head in ROLES else "process"
                possible[become] = Subject(role, head, become)
        if is_odin(heads):
            possible["outcome"] = Subject(role, QUALITY_HEAD, "outcome")
    if trained == "policy":
        possible["policy"] = Subject("policy", "", "policy")
        default = "policy"
    else:
        default = next(iter(possible)) if len(possible) == 1 else ""
    chosen = what or default
    if not what and is_advantage(models[trained].score_heads):
        raise ValueError(
            "--what is missing: the run is an advantage model, r − e, and no published form has a "
            "place for e; --what=outcome writes r alone, which ranks answers to one prompt alike"
        )
    if chosen not in possible:
        said = f"--what={what!r}: the run" if what else "--what is missing: the run"
        raise ValueError(f"{said} can become {', '.join(possible) or 'nothing that is known'}")
    return possible[chosen]


def _exported(config: ModelConfig, subject: Subject) -> ModelConfig:
    """The config of what is exported."""
    heads = () if subject.what == "policy" else (subject.what,)
    return dataclasses.replace(
        config, lm_head=not heads, score_heads=heads, members=1, ensemble="none"
    )


def _check_member(config: ModelConfig, member: int) -> None:
    """Raises a ValueError for a member that an ensemble lacks, or one of what is one model."""
    if config.members == 1 and member >= 0:
        raise ValueError(f"--member={member}, but the run trained one model; leave it out")
    if config.members > 1 and not 0 <= member < config.members:
        raise ValueError(
            f"--member={member}: the run is an ensemble of {config.members} models, which are "
            f"written one by one, a folder each; wanted 0 to {config.members - 1}"
        )


def _with_head(params: Params, subject: Subject) -> Params:
    """The parameters of what is exported: one head, under the name of what it becomes."""
    kept = {name: tree for name, tree in params.items() if name != "heads"}
    if subject.what == "policy":
        return kept
    kept.pop("unembed", None)
    return kept | {"heads": {subject.what: params["heads"][subject.head]}}


def _adapters_base(workdir: str, config: ModelConfig, named: str) -> str:
    """What adapters name as the model that they change.

    Raises:
        ValueError: there are no adapters, or no such model.
    """
    if not config.lora_rank:
        raise ValueError(f"--adapters: {workdir} trained no adapters (model.lora_rank=0)")
    start = named or base_files.run_config(workdir).get("model", {}).get("init_from", "")
    if not start:
        raise ValueError(
            "--adapters: the run began as random weights, which no folder holds; export the whole "
            "model (without --adapters)"
        )
    if (pathlib.Path(start) / "model.json").is_file():
        raise ValueError(
            f"--adapters: the run began as another run, {start}; export that one and name its "
            "folder with --base"
        )
    if is_adapter_folder(start):
        raise ValueError(
            f"--adapters: {start} holds adapters, which were merged before these were trained; "
            "export the whole model (without --adapters), or name such weights' folder by --base"
        )
    # Adapters are read from anywhere; what is no folder here is a name on the hub.
    return str(pathlib.Path(start).resolve()) if pathlib.Path(start).is_dir() else start


def _check_base(
    params: Params, config: ModelConfig, base: str, mesh: Mesh, rules: ShardingRules
) -> None:
    """Raises a ValueError for a folder that holds other weights than adapters were trained on.

    A name on the hub is taken as it is.
    """
    if not pathlib.Path(base).is_dir():
        return
    with within(f"--adapters: the base {base}"):
        if not roles.is_hf_folder(base):
            raise ValueError("no Hugging Face folder; wanted a config.json with a model_type")
        # In the type in which the run began with it.
        types = {"param_dtype": config.param_dtype}
        named, held = load_hf(base, mesh, rules, overrides=types)
        if architecture(named) != architecture(config):
            raise ValueError("another architecture than that of the adapters' model")
        _, trunk = partition(params, config)
        if not roles.same_weights(held, trunk):
            raise ValueError(
                "other weights than the adapters were trained on; name the folder they had by "
                "--base, or export the whole model (without --adapters)"
            )


def _published(workdir: str, config: ModelConfig, subject: Subject) -> dict[str, Any] | None:
    """The config.json that the run began with; None for a model of ours.

    A critic may have begun as another model than the policy.
    """
    path = pathlib.Path(workdir) / base_files.FOLDER / base_files.CONFIG
    if not path.is_file():
        return None
    base = run_folder.read_json(path)
    if subject.role == "value":
        with within(str(path)):
            same = architecture(ModelConfig(**family_of(base).fields(base))) == architecture(config)
        return base if same else None
    return base


def _tokenizer(workdir: str) -> Tokenizer | None:
    """The tokenizer that the run used, from its own files where it kept them."""
    named = base_files.own_tokenizer(workdir).name
    if not named:
        _log.warning("%s names no tokenizer; none is exported", workdir)
        return None
    with within("data.tokenizer"):
        return load_tokenizer(named)


def _token_ids(text: Tokenizer | None, what: str, pad: int) -> dict[str, Any]:
    """Special tokens for config.json.

    Raises:
        ValueError: an outcome model would not see the token at which texts end.
    """
    if text is None:
        return {"pad_token_id": pad} if pad >= 0 else {}
    ends = list(text.eos_ids)
    chosen = pad if pad >= 0 else text.pad_id
    if what == "outcome" and chosen in ends:
        raise ValueError(
            f"the padding token {chosen} also ends texts: transformers takes the last token that "
            "is no padding for the end of a text, and the score would be read before it; set "
            "--pad_token_id to a token that stands in no text"
        )
    return {
        "bos_token_id": text.bos_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": chosen,
    }


def _files(
    workdir: str, text: Tokenizer | None, what: str, token_ids: dict[str, Any], *, changed_pad: bool
) -> dict[str, bytes]:
    """Tokenizer, chat template and generation settings; all but tensors and config.json."""
    folder = pathlib.Path(workdir) / base_files.FOLDER
    kept = base_files.start_files(workdir)
    if not base_files.has_tokenizer(folder):
        named = base_files.run_config(workdir).get("data", {}).get("tokenizer", "")
        kept |= base_files.tokenizer_files(named, kept)
    files = {k: path.read_bytes() for k, path in kept.items() if k != base_files.CONFIG}
    if text is not None and not set(files) & set(base_files.TOKENIZER):
        _log.warning(
            "tokenizer %r has no files to copy; the folder holds the model alone", text.name
        )
    if changed_pad and "tokenizer_config.json" in files:
        files["tokenizer_config.json"] = _set_pad(files, token_ids["pad_token_id"])
    if what == "policy" and text is not None:
        files.setdefault(base_files.GENERATION, json_bytes(token_ids))
    if what != "policy":
        files.pop(base_files.GENERATION, None)
    return files


def _card(workdir: str, subject: Subject, *, dtype: str, member: int) -> dict[str, bytes]:
    """The card of a reward model as the README.md that the hub shows, and as it is."""
    if subject.role != "reward":
        return {}
    facts = card.read(workdir)
    if facts is None:
        _log.warning("%s has no %s: the folder is without a card", workdir, card.JSON)
        return {}
    exported = dict(what=subject.what, dtype=dtype) | (dict(member=member) if member >= 0 else {})
    page = card_page.page(facts, exported).encode()
    return {"README.md": page, card.JSON: json_bytes(facts | {"exported": exported})}


def _set_pad(files: dict[str, bytes], pad: int) -> bytes:
    """tokenizer_config.json with another padding token, so that the tokenizer pads as the model
    expects it."""
    settings = json.loads(files["tokenizer_config.json"])
    known = json.loads(files.get("tokenizer.json", b"{}"))
    words = {entry["id"]: entry["content"] for entry in known.get("added_tokens", ())}
    vocabulary = known.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, dict):
        words |= {number: word for word, number in vocabulary.items()}
    else:
        words |= {number: word for number, (word, *_) in enumerate(vocabulary)}
    if pad not in words:
        raise ValueError(f"--pad_token_id={pad} is not in the tokenizer; wanted one of its ids")
    return json_bytes(settings | {"pad_token": words[pad]})


if __name__ == "__main__":
    program.run_flags(export)
