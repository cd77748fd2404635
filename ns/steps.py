"""The steps of the loop, each safe to kill and to run again. KFP components call these and nothing else.

Values that pass between steps are short strings: keys below the root, never bytes. `config_uri` names the experiment's YAML,
`root` the store's URI that holds everything, `run` the folder for this run's notes.
"""

STOP = "stop"
"""What `resolve` answers when the loop is over."""


def prepare_data(config_uri: str, root: str, run: str) -> str:
    """Finds or imports the three datasets. Returns the key of `prepared.json`."""
    raise NotImplementedError


def train(
    config_uri: str, root: str, run: str, data: str, generation: int, teacher: str = "", labels: str = ""
) -> str:
    """Trains the first teacher (generation 0) or a student on the selection `labels`. Returns the key of the model's folder."""
    raise NotImplementedError


def evaluate(config_uri: str, root: str, run: str, data: str, generation: int, model: str) -> str:
    """Evaluates a model on the held-out images. Returns the key of `evaluation.json`."""
    raise NotImplementedError


def resolve(config_uri: str, root: str, run: str, data: str, generation: int, first_teacher: str) -> str:
    """Says whether generation `generation` takes place: the key of its teacher, or STOP."""
    raise NotImplementedError


def plan_labels(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str) -> list[str]:
    """Splits the pool into ranges of shards, `START-STOP` (half open), one per labelling task."""
    raise NotImplementedError


def label_shards(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, shards: str) -> None:
    """Labels one range of shards of the pool."""
    raise NotImplementedError


def commit_labels(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str) -> str:
    """Joins the labelled shards into a label set and selects from it. Returns the key of the selection's folder."""
    raise NotImplementedError


def gate(config_uri: str, root: str, run: str, data: str, generation: int, teacher: str, student: str) -> str:
    """Compares student and teacher and records the generation. Returns the key of `verdict.json`."""
    raise NotImplementedError


def report(config_uri: str, root: str, run: str) -> str:
    """Writes the run's report. Returns its key."""
    raise NotImplementedError
