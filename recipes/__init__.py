"""What ships as files: recipes, chat templates, benchmark registry, lm-eval tasks. The one place that knows where."""

from importlib.resources import files
from pathlib import Path

#: Folder of the shipped recipes, `NAME.yaml` each. Wheels are installed unpacked, so it is a folder on disk.
PRESETS = Path(str(files(__name__))).resolve()
#: Chat templates, `NAME.jinja` each.
CHAT_TEMPLATES = PRESETS / "chat_templates"
#: Definitions of lm-eval tasks, `NAME.yaml` each, and the functions that they name.
LM_EVAL_TASKS = PRESETS / "lm_eval"
#: Sweeps over learning rate and batch size, `NAME.yaml` each.
SWEEPS = PRESETS / "sweeps"
#: The benchmarks that training data are checked against.
BENCHMARK_REGISTRY = PRESETS / "benchmarks" / "registry.yaml"
#: Published scores that ours are shown beside.
PUBLISHED = PRESETS / "published" / "smoltulu.yaml"

# In a checkout these lie beside `recipes/`, at the top; a wheel has copies there, in the folder of `smoltulu`.
#: Deployments, as a checkout has them.
PREFECT_YAML = PRESETS.parent / "prefect.yaml"
#: Prefect's settings.
PREFECT_TOML = PRESETS.parent / "prefect.toml"
#: The versions that were tested together.
CONSTRAINTS = PRESETS.parent / "constraints.txt"
#: The checkout that the package is imported from; None where a wheel was installed.
CHECKOUT = PRESETS.parent if (PRESETS.parent / "pyproject.toml").is_file() else None
