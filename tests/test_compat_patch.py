"""Patching: every place where a name is bound, all or nothing, and back; by call and by FASTRLHF_PATCH."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
from compat_peers import PEERS

import fastrlhf
from fastrlhf.compat import FRAMEWORKS, Patch, PatchError, _patch, at_import, original

FILES = {
    "__init__.py": "",
    "core.py": """
def mean(x):
    return "their mean"

def total(x):
    return "their total"

class Loss:
    def __call__(self, x):
        return "their loss"

class Maker:
    @staticmethod
    def advantages(x):
        return "their advantages"

    def values(self, x):
        return "their values"

LOSSES = {"mean": mean, "other": print}
""",
    "trainer.py": """
from .core import Loss, mean as average
from framework.core import *

class Trainer:
    reduce = staticmethod(average)
    loss_class = Loss
""",
    "late.py": "from framework.core import mean, Loss",
}


def our_mean(x, *, exact_dtype=False):
    return "our mean, exact" if exact_dtype else "our mean"


class OurLoss:
    exact_dtype = False

    def __call__(self, x):
        return "our loss, exact" if self.exact_dtype else "our loss"


@pytest.fixture
def framework(tmp_path, monkeypatch):
    """A package `framework` 1.4, and ours for it."""
    for name, text in FILES.items():
        path = tmp_path / "framework" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    metadata = tmp_path / "framework_distribution-1.4.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: framework-distribution\nVersion: 1.4\n")
    monkeypatch.syspath_prepend(tmp_path)
    ours = ModuleType("fastrlhf.compat.framework")
    ours.PACKAGE, ours.DISTRIBUTION, ours.VERSIONS = "framework", "framework-distribution", ">=1.2,<1.5"
    ours.REPLACEMENTS = {
        "framework.core.mean": our_mean,
        "framework.core.Loss": OurLoss,
        "framework.core.Maker.advantages": lambda x: "our advantages",
        "framework.core.Maker.values": lambda self, x: f"our values of {type(self).__name__}",
        "framework.core.later": print,
    }
    ours.OPTIONAL = {"framework.core.later": ">=1.5"}
    ours.MORE_ACCURATE = {"framework.core.mean": "in everything"}
    ours.calls = []
    ours.register, ours.unregister = (lambda: ours.calls.append("register")), (lambda: ours.calls.append("unregister"))
    monkeypatch.setitem(sys.modules, ours.__name__, ours)
    monkeypatch.setitem(FRAMEWORKS, "framework", "framework")
    yield ours
    if "framework" in _patch._active:
        _patch._active["framework"].restore()
    for name in [name for name in sys.modules if name.split(".")[0] == "framework"]:
        del sys.modules[name]


def load(name: str) -> ModuleType:
    return importlib.import_module(f"framework.{name}")


def everything(core: ModuleType, trainer: ModuleType) -> list:
    classes = [getattr(x, name) for x in (core.Maker, trainer.Trainer) for name in vars(x)]
    return [dict(vars(core)), dict(vars(trainer)), classes, dict(core.LOSSES)]


def test_every_place_is_bound_and_bound_back(framework):
    core, trainer = load("core"), load("trainer")
    globals()["by_value"] = core.mean
    before = everything(core, trainer)
    found = fastrlhf.patch("framework")
    assert isinstance(found, Patch)
    assert (found.framework, found.version) == ("framework", "1.4")
    assert {place: set(places) for place, places in found.bound.items()} == {
        "framework.core.mean": {
            *("framework.core.mean", "framework.core.LOSSES['mean']", "framework.trainer.average"),
            *("framework.trainer.mean", "framework.trainer.Trainer.reduce", "framework.trainer.LOSSES['mean']"),
            f"{__name__}.by_value",
        },
        "framework.core.Loss": {
            "framework.core.Loss",
            "framework.trainer.Loss",
            "framework.trainer.Trainer.loss_class",
        },
        "framework.core.Maker.advantages": {"framework.core.Maker.advantages"},
        "framework.core.Maker.values": {"framework.core.Maker.values"},
    }
    assert trainer.average is trainer.Trainer.reduce is core.LOSSES["mean"] is by_value is our_mean  # noqa: F821
    assert trainer.Trainer.loss_class is OurLoss
    assert core.Maker.advantages(1) == core.Maker().advantages(1) == "our advantages"
    assert core.Maker().values(1) == "our values of Maker"
    assert core.total(1) == "their total"
    assert load("late").mean is our_mean
    assert original("framework.core.mean")(1) == "their mean"
    assert framework.calls == ["register"]
    found.restore()
    found.restore()
    assert everything(core, trainer) == before
    assert load("late").mean is globals().pop("by_value") is core.mean is original("framework.core.mean")
    assert framework.calls == ["register", "unregister"]


def test_again_it_is_the_same_patch_and_the_last_with_restores(framework):
    core = load("core")
    theirs = core.mean
    with fastrlhf.patch("framework") as outer:
        with fastrlhf.patch("framework") as inner:
            assert inner is outer
        assert core.mean is our_mean
        with pytest.raises(ValueError, match="exact_dtype: got True, wanted False"):
            fastrlhf.patch("framework", exact_dtype=True)
    assert core.mean is theirs
    with fastrlhf.patch("framework", exact_dtype=True) as exact:
        assert (core.mean(1), core.Loss()(1)) == ("our mean, exact", "our loss, exact")
        assert core.Maker.advantages(1) == "our advantages"  # has no such option
        assert exact is not outer
    assert core.mean is theirs


def test_who_has_ours_of_his_own_keeps_it(framework):
    core = load("core")
    core.ours_on_purpose = our_mean
    fastrlhf.patch("framework").restore()
    assert core.ours_on_purpose is our_mean
    assert core.mean is not our_mean


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("VERSIONS", ">=1.5", r"framework 1.4: wanted >=1.5; nothing was changed. Found: framework.core.Loss, .*mean."),
        ("OPTIONAL", {}, r"some names are missing.*Missing: framework.core.later \(framework.core has no later\)"),
        ("REPLACEMENTS", {"framework.no.such": print}, r"Found: nothing. Missing: framework.no.such"),
        ("REPLACEMENTS", {"framework.core.Nobody.x": print}, r"no attribute 'Nobody'"),
        ("DISTRIBUTION", "nobody-has-this", "framework: not installed"),
    ],
)
def test_all_or_nothing(framework, attribute, value, message):
    setattr(framework, attribute, value)
    core = load("core")
    before = dict(vars(core))
    with pytest.raises(PatchError, match=message):
        fastrlhf.patch("framework")
    assert dict(vars(core)) == before
    assert "framework" not in _patch._active
    assert framework.calls == []


def test_a_module_that_cannot_be_imported_is_a_missing_name(framework, tmp_path):
    (tmp_path / "framework" / "broken.py").write_text("import nobody_has_this")
    framework.REPLACEMENTS["framework.broken.mean"] = our_mean
    with pytest.raises(PatchError, match=r"framework.broken.mean \(No module named 'nobody_has_this'\)"):
        fastrlhf.patch("framework")


def test_a_registration_that_fails_leaves_nothing(framework):
    def fail():
        raise KeyError("registry")

    framework.register = fail
    core = load("core")
    before = dict(vars(core))
    with pytest.raises(KeyError, match="registry"):
        fastrlhf.patch("framework")
    assert dict(vars(core)) == before


def test_report(framework, capsys):
    fastrlhf.patch_report()
    assert "nothing" in capsys.readouterr().out
    load("trainer")
    with fastrlhf.patch("framework", exact_dtype=True):
        fastrlhf.patch_report()
    told = " ".join(capsys.readouterr().out.split())
    for part in ("framework 1.4", "core.mean", "trainer.average", "in everything", "exact_dtype"):
        assert part in told


def test_unknown_frameworks():
    with pytest.raises(ValueError, match="framework: got 'peft', wanted one of 'trl'"):
        fastrlhf.patch("peft")


@pytest.mark.parametrize("framework", [x for x in FRAMEWORKS if (Path(_patch.__file__).parent / f"{x}.py").exists()])
def test_what_every_module_says_of_itself(framework):
    ours = importlib.import_module(f"fastrlhf.compat.{framework}")
    assert FRAMEWORKS[framework] == ours.PACKAGE
    assert all(place.split(".")[0] == ours.PACKAGE and callable(x) for place, x in ours.REPLACEMENTS.items())
    assert set(getattr(ours, "OPTIONAL", {})) | set(getattr(ours, "MORE_ACCURATE", {})) <= set(ours.REPLACEMENTS)
    assert all(x.__doc__ for x in ours.REPLACEMENTS.values())
    assert len(set(ours.REPLACEMENTS.values())) == len(ours.REPLACEMENTS)


class TestAtImport:
    def run(self, code: str, variable: str | None, *paths: Path, options: tuple[str, ...] = ()):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
        environment.pop(at_import.VARIABLE, None)
        if variable is not None:
            environment[at_import.VARIABLE] = variable
        command = [sys.executable, "-W", "ignore", *options, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    def test_the_installation_has_its_file(self):
        installed = Path(sysconfig.get_path("purelib")) / "fastrlhf.pth"
        assert installed.read_text() == (Path(_patch.__file__).parent / "fastrlhf.pth").read_text()

    def test_a_wheel_has_it_at_its_root(self, tmp_path):
        root = Path(__file__).parents[1]
        command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
        subprocess.run(command, cwd=root, check=True, capture_output=True)
        assert (tmp_path / "fastrlhf.pth").exists()
        assert (tmp_path / "fastrlhf" / "compat" / "at_import.py").exists()

    def test_without_the_variable_nothing_is_imported(self):
        done = self.run("import sys; print([x for x in sys.modules if 'fastrlhf' in x and 'finder' not in x])", None)
        assert (done.stdout, done.stderr) == ("[]\n", "")

    def test_with_it_nothing_heavy_is_imported(self):
        code = "import sys; print('fastrlhf.compat.at_import' in sys.modules, 'torch' in sys.modules)"
        done = self.run(code, "trl, verl")
        assert (done.stdout, done.stderr) == ("True False\n", "")

    def test_unknown_names_do_not_break_the_start(self):
        done = self.run("print('started')", "trl,nonsense")
        assert (done.returncode, done.stdout) == (0, "started\n")
        assert "FASTRLHF_PATCH: got nonsense, wanted some of trl, verl" in done.stderr

    def test_a_package_is_patched_when_it_is_imported(self, framework, tmp_path):
        """Also where it is looked for, without being imported, before; and in processes that are started afresh."""
        (tmp_path / "plugin.py").write_text(
            "import sys, types\n"
            "from fastrlhf.compat import FRAMEWORKS\n"
            "FRAMEWORKS['framework'] = 'framework'\n"
            "ours = sys.modules['fastrlhf.compat.framework'] = types.ModuleType('ours')\n"
            "ours.PACKAGE, ours.DISTRIBUTION, ours.VERSIONS = 'framework', 'framework-distribution', '>=1.2'\n"
            "def mean(x): return 'our mean'\n"
            "ours.REPLACEMENTS = {'framework.core.mean': mean}\n"
            "from fastrlhf.compat.at_import import install\n"
            "install()\n"
        )
        (tmp_path / "worker.py").write_text(
            "import plugin, importlib.util\n"
            "assert importlib.util.find_spec('framework') is not None\n"
            "def work(_):\n"
            "    from framework.trainer import average\n"
            "    return average(1)\n"
            "if __name__ == '__main__':\n"
            "    import multiprocessing\n"
            "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
            "        print([work(0), *pool.map(work, [0])])\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), at_import.VARIABLE: "framework"}
        command = [sys.executable, "-W", "ignore", str(tmp_path / "worker.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stdout == "['our mean', 'our mean']\n", done.stderr

    def test_imported_before_it_is_patched_at_once(self, framework, monkeypatch):
        core = load("core")
        monkeypatch.setenv(at_import.VARIABLE, "framework")
        monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
        at_import.install()
        at_import.install()
        assert core.mean is our_mean
        assert sum(isinstance(finder, at_import._Finder) for finder in sys.meta_path) == 1

    def test_a_framework_of_unknown_version_cannot_be_imported(self, framework, monkeypatch):
        monkeypatch.setattr(framework, "VERSIONS", ">=2")
        monkeypatch.setenv(at_import.VARIABLE, "framework")
        monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
        at_import.install()
        with pytest.raises(PatchError, match=r"framework 1.4: wanted >=2"):
            import framework as _  # noqa: F401

    @pytest.mark.skipif(not (PEERS / "trl").is_dir(), reason="trl is not installed; `make .venv/.peers` does that")
    def test_trl_in_a_fresh_process(self):
        code = (
            "from trl.trainer.utils import selective_log_softmax as ours; import fastrlhf; print(ours.__module__); "
            "print(fastrlhf.patch('trl').version)"
        )
        done = self.run(code, "trl", PEERS)
        assert done.stdout == "fastrlhf.compat.trl\n1.16.0\n", done.stderr
