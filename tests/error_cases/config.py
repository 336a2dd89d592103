"""The command line, the config file and its overrides: wrong, unknown, out of range, at odds."""

import os
import pathlib

from tests.error_cases.case import Case


def _file(text: str | bytes, name: str = "config.py"):
    def make(folder: pathlib.Path) -> None:
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return make


def _command(what: str, message: str, *arguments: str, config="config.py", **options) -> Case:
    return Case("command line", what, message, arguments, config=config, **options)


def _written(what: str, text: str | bytes, message: str, **options) -> Case:
    return Case("config file", what, message, make=_file(text), **options)


def _field(override: str, message: str, *more: str) -> Case:
    return Case("config field", override, message.replace("|", r"\|"), (override, *more))


def _pipe(folder: pathlib.Path) -> None:
    os.mkfifo(folder / "pipe.py")


def _loop(folder: pathlib.Path) -> None:
    (folder / "loop.py").symlink_to("loop.py")


COMMAND_LINE = (
    _command("no config", r"required: --config\. See .*--help", config=None),
    _command("an unknown option", "Unrecognized arguments: --verbose", "--verbose"),
    _command(
        "an override written as an option",
        "Unrecognized arguments: --train.steps=3. Fields are written without dashes",
        "--train.steps=3",
    ),
    _command(
        "an option without its value", "argument --config|Argument --config", config=None
    )._replace(overrides=("--config",)),
    _command("a config that is not there", "absent.py: no such Python file", config="absent.py"),
    _command("a directory as config", "model: no such Python file .it is a dir", config="model"),
    _command("a data file as config", r"rows.jsonl: no such Python file", config="rows.jsonl"),
    _command("a named pipe as config", "it is a named pipe", config="pipe.py", make=_pipe),
    _command("a link to itself as config", "out of reach", config="loop.py", make=_loop),
    _command("a name too long for a file", "name too long", config=f"{'x' * 300}.py"),
    _command("a config that the package lacks", "no config of that name", config="bundled:huge"),
    _command(
        "a path behind bundled:",
        "no config of that name",
        config="bundled:../configs/tiny",
    ),
    _command("an override without a value", "must look like section.field=value", "train.steps"),
    _command("an override without a section", "must look like section.field=value", "steps=3"),
    _command("an override with three names", "must look like", "train.steps.x=3"),
    _command("an unknown section", "section 'trian'; did you mean train?", "trian.steps=3"),
    _command("an unknown field", "train.stepz; did you mean train.steps", "train.stepz=3"),
    _command("a field of another section", "Unknown config field train.r_max", "train.r_max=3"),
    _command("a method of a section", "Unknown config field train.check", "train.check=1"),
    _command(
        "both steps and epochs",
        "exactly one of train.steps and train.epochs, got 3 and 2",
        "train.steps=3",
        "train.epochs=2",
    ),
)
IMPORT = "from drlora_jax.config import *\n"
CONFIG_FILES = (
    _written(
        "a syntax error",
        "def get_config(:",
        "does not run: SyntaxError",
        varies="(?<=SyntaxError: ).*",
    ),
    _written("an exception", "1 / 0", "does not run: ZeroDivisionError"),
    _written("sys.exit(0)", "import sys; sys.exit(0)", "does not run: SystemExit: 0"),
    _written(
        "endless recursion", "def f(): f()\nf()", "RecursionError", varies="(?<=RecursionError: ).*"
    ),
    _written("an unknown import", "import nowhere_at_all", "No module named 'nowhere_at_all'"),
    _written("a NUL byte", b"x = 1\0", "does not run", varies="(?<=does not run: ).*"),
    _written(
        "text that is not UTF-8",
        b"x = '\xff'",
        "does not run: SyntaxError",
        varies="(?<=SyntaxError: ).*",
    ),
    _written("nothing", "", r"has no function get_config\(\)"),
    _written("a get_config that is no function", "get_config = 3", "not callable"),
    _written("a get_config with an argument", "def get_config(x): pass", "does not run: TypeError"),
    _written("a dict", "def get_config(): return {}", "must return a TrainConfig, got dict"),
    _written(
        "an unknown field",
        IMPORT + "def get_config(): return TrainConfig(train=TrainSection(stps=3))",
        "does not run: TypeError.*stps",
        varies="(?<=TypeError: ).*",
    ),
    _written(
        "a field of another policy",
        IMPORT
        + "def get_config(): return TrainConfig("
        + "allocation=AllocationSection(kind='prilora', share=0.5))",
        "allocation.share=0.5 is for kind=moe_sieve, got kind=prilora; leave it out",
    ),
    _written(
        "a section in the place of another",
        IMPORT + "def get_config(): return TrainConfig(train=RunSection())",
        "train must be a TrainSection, got RunSection",
    ),
    _written(
        "a value of another type",
        IMPORT + "def get_config(): return TrainConfig(run=RunSection(seed='1'))",
        "run.seed must be int, got '1'",
    ),
    _written(
        "an integer beyond every float",
        IMPORT + "def get_config(): return TrainConfig(train=TrainSection(learning_rate=10**400))",
        "train.learning_rate must be float",
    ),
    _written(
        "an integer that Python does not print",
        IMPORT + "def get_config(): return TrainConfig(train=TrainSection(steps=10**5000))",
        "got a number with thousands of digits",
    ),
)
RANDOM = "allocation.kind=random"
LORA = ("adapter.kind=lora", "allocation.kind=uniform")
PRUNING = ("allocation.kind=adalora", "allocation.r_init=4")
FIELDS = (
    _field("train.steps=many", "train.steps must be int | none, got 'many'"),
    _field("train.steps=3.5", "train.steps must be int | none, got '3.5'"),
    _field("train.steps=0", "train.steps must be greater than 0, got 0"),
    _field("train.steps=-5", "train.steps must be greater than 0, got -5"),
    _field("train.steps=99999999999999999999", "train.steps must be within"),
    _field("train.steps=none", "exactly one of train.steps and train.epochs"),
    _field("train.batch_size=", "train.batch_size must be int, got ''"),
    _field("train.batch_size=none", "train.batch_size must be int, got 'none'"),
    _field("train.batch_size=2000000000", "at most 2147483647 tokens, got"),
    _field("train.sequence_length=1", "train.sequence_length must be at least 2"),
    _field("train.micro_batches=3", "must be a multiple of train.micro_batches"),
    _field("train.learning_rate=fast", "train.learning_rate must be float, got 'fast'"),
    _field("train.learning_rate=nan", "train.learning_rate must be float, got nan"),
    _field("train.learning_rate=inf", "train.learning_rate must be float, got inf"),
    _field("train.learning_rate=1e400", "train.learning_rate must be float, got inf"),
    _field("train.learning_rate=-1e-3", "train.learning_rate must be greater than 0"),
    _field("train.beta2=1", "train.beta2 must be in"),
    _field("train.schedule=step", "must be linear | cosine | constant, got 'step'"),
    _field("data.pack=1", "data.pack must be bool, got '1'"),
    _field("data.max_rows=0", "data.max_rows must be greater than 0"),
    _field("data.too_long=split", 'needs data.format="text"'),
    _field("data.template=alpacca", "does not exist; did you mean alpaca"),
    _field("data.template=tokenizer", "does not apply to data.format=text", "data.format=text"),
    _field("data.path=", "data.path names no training data"),
    _field("data.format=choice", "needs paths TASK=PATH, .*; got 'rows.jsonl'"),
    _field("data.path=arc_esay=rows.jsonl", "did you mean arc_easy", "data.format=choice"),
    _field("run.dir=", "run.dir must name a directory"),
    _field("run.seed=4294967296", "run.seed must be"),
    _field("model.path=", "model.path must name a model"),
    _field("model.dtype=float16", "model.dtype must be auto | float32 | bfloat16"),
    _field("model.experts=fast", "auto | native | block | ragged | mosaic | dense | tokamax, got"),
    _field("model.experts=native", "its kernels compute in float32", "model.dtype=bfloat16"),
    _field("model.attention=native", "its kernels compute in float32", "model.dtype=bfloat16"),
    _field("model.experts=mosaic", "cannot be used here: its kernels are for NVIDIA's Hopper"),
    _field("model.experts=tokamax", "cannot be used here: it has kernels for TPU and NVIDIA"),
    _field("model.experts=ragged", "on cpu and multiplies every row with every expert"),
    _field("adapter.targets=", "adapter.targets must name at least one projection"),
    _field(
        "adapter.targets=w1",
        "'w1' matches no weight of this olmoe model.*Roles: down, gate, .*up, v, gate_up",
    ),
    _field("adapter.targets=q,v", "adapts no expert; add gate, up, down or gate_up"),
    _field("adapter.targets=gate_up,up", "must name either gate_up or gate and up"),
    _field("adapter.targets=(up", "'.up' is not a regular expression"),
    _field("adapter.kind=dora", "adapter.kind must be"),
    _field("adapter.kind=mixlora", "has experts of its own"),
    _field("adapter.kind=mola", "has experts of its own"),
    _field("adapter.experts_per_layer=2468", "is for kind=mixlora or mola, got kind=expert_lora"),
    _field("allocation.r_init=0", "so none could gain one", "adapter.kind=mola"),
    _field("adapter.factor_dropout=0.5", "is for kind=lora, got kind=expert_lora; leave it out"),
    _field("adapter.factor_dropout=1", "adapter.factor_dropout must be in", *LORA),
    _field("adapter.expert_scale=0", "adapter.expert_scale must be"),
    _field("adapter.expert_dropout=1", "adapter.expert_dropout must be in"),
    _field("adapter.expert_scale=3", "is for kind=expert_lora.* or .*, got kind=lora", *LORA),
    _field("adapter.dora=true", "is for kind=lora, got kind=expert_lora; leave it out"),
    _field(
        "adapter.experts_per_token=9",
        "must be from 1 to adapter.num_experts",
        "adapter.kind=mixlora",
    ),
    _field("adapter.num_experts=0", "adapter.num_experts must be", "adapter.kind=mola"),
    _field("adapter.top_p=0", "adapter.top_p must be in", "adapter.kind=mola"),
    _field("adapter.kind=lora", "no experts to share ranks among"),
    _field("train.b_learning_rate_ratio=0", "b_learning_rate_ratio must be greater than 0"),
    _field("adapter.rank=0", "adapter.rank must be greater than 0"),
    _field("adapter.rank=1000000", "adapter.rank must be at most 65536"),
    _field("allocation.r_init=3", "0 <= r_init <= r_target <= r_max, got 3, 2, 4"),
    _field("allocation.r_max=1000000", "allocation.r_max must be at most 65536"),
    _field("allocation.interval=11", "no growth event fits"),
    _field("allocation.p_grow=0", "allocation.p_grow must be greater than 0"),
    _field(
        "allocation.released=true", "fixes importance=gate_abs", "allocation.importance=gate_sq"
    ),
    _field("allocation.power=-1", "power must be 0 or more, got -1", "allocation.kind=usage"),
    _field("allocation.r_init=4", "usage needs 0 <= r_init <= r_tar", "allocation.kind=usage"),
    _field("allocation.kind=adalora", "r_target=2, r_init=1, r_max=4"),
    _field("allocation.importance=probe", "scores the next inactive rank", *PRUNING),
    _field(
        "allocation.r_init=1",
        "2 . r_target - r_init .5. in the last; both must be between 0 and allocation.r_max .4.",
        "allocation.kind=prilora",
        "allocation.r_target=3",
    ),
    _field(
        "allocation.kind=alphalora",
        "alpha_file=rows.jsonl cannot be used: it cannot be read as exponents",
        "allocation.alpha_file=rows.jsonl",
    ),
    _field("allocation.experts=9", "other kinds have a fixed number", "allocation.kind=alphalora"),
    _field(
        "allocation.rank_rule=per_expert",
        "2 // 4 experts = 0; set allocation.r_target to 4 or more",
        "allocation.kind=uniform",
    ),
    _field(
        "allocation.interval=4",
        "is for kind=dr_lora, random or adalora, got kind=uniform; leave it out",
        "allocation.kind=uniform",
    ),
    _field("allocation.rank_rule=per_top_k", "is for kind=uniform, got kind=dr_lora"),
    _field("allocation.spectral_prior=1", "for kind=dr_lora, got", RANDOM),
    _field(
        "allocation.spectral_start=true",
        "for kind=dr_lora, got kind=random",
        "allocation.kind=random",
    ),
    _field("allocation.experts=7", "is for kind=alphalora, got kind=dr_lora"),
    _field("allocation.pattern=ranks.json", "is for kind=pattern, got kind=dr_lora"),
    _field("allocation.alpha_file=alpha.json", "spectral_start, got kind=dr_lora without them"),
    _field("adapter.top_p=0.5", "is for kind=mixlora or mola, got kind=expert_lora"),
    _field("adapter.router_learning_rate=1e-3", "for routers that train"),
    _field("mesh.exchange=ragged", "is for TPUs, but the platform is cpu", "mesh.expert=2"),
    _field("allocation.interval=10", "no pruning event fits: warm-up ends at step 3", *PRUNING),
    _field("mesh.data=0", "mesh sizes must be positive"),
    _field("mesh.data=-1", "at most one may be -1", "mesh.fsdp=-1"),
    _field("mesh.data=999", "data=999 .* does not fit the 8 devices"),
    _field("mesh.expert=3", "8 rows. must be a multiple of mesh.data x mesh.fsdp x mesh.expert"),
)
CASES = (*COMMAND_LINE, *CONFIG_FILES, *FIELDS)
