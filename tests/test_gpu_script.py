"""tools/gpu.sh, with a Python that only notes how it is called: stages, limits, what is done again after a stop."""

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "gpu.sh"
# Notes its arguments; fails, hangs or is killed where FAIL, HANG or KILL says so; `bench SUITE --list` names two ops.
STUB = """#!/usr/bin/env bash
echo "$* dirty=${GENENGINE_DIRTY:-}" >>"$CALLS"
[ -n "${FAIL:-}" ] && [[ "$*" == *$FAIL* ]] && exit 3
[ -n "${KILL:-}" ] && [[ "$*" == *$KILL* ]] && kill -9 $$
case "$*" in
  *has_cuda_kernels*) exit 1 ;;
  *"pip install"*) mkdir -p "$work/site"; cp -r "$root/genengine" "$work/site/"; exit 0 ;;
  *--list*) [ -n "${NAMELESS:-}" ] || printf 'adaln  (ops)\\n    adaln: shapes\\nglu  (ops)\\n'; exit 0 ;;
esac
[ -n "${HANG:-}" ] && [[ "$*" == *$HANG* ]] && exec sleep 60
echo "ran $*"
"""


class Checkout:
    """A repository with nothing but the script and one module, and what a run of it did."""

    def __init__(self, folder):
        self.folder, self.root, self.out = folder, folder / "checkout", folder / "out"
        self.stub, self.log = folder / "python", folder / "calls"
        self.stub.write_text(STUB)
        self.stub.chmod(0o755)
        (folder / "tmp").mkdir()
        for name in ("genengine", "tools", "kernels", "benchmarks"):
            (self.root / name).mkdir(parents=True)
        shutil.copy(SCRIPT, self.root / "tools")
        self.write("__init__.py", "")
        (self.root / ".gitignore").write_text("*.abi.so\n")
        self.git("init", "-q")
        self.git("add", ".")
        self.commit("first")

    def git(self, *arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *settings, *arguments], cwd=self.root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(self, message):
        self.git("commit", "-qam", message, "--allow-empty")

    def write(self, name, text):
        (self.root / "genengine" / name).write_text(text)

    def run(self, stage="all", **settings):
        self.log.write_text("")
        ours = {name for name in os.environ if name.startswith("GENENGINE_") or name in ("OUT", "FORCE", "DEVICE")}
        environment = {name: value for name, value in os.environ.items() if name not in ours} | {
            "CALLS": str(self.log), "OUT": str(self.out), "TMPDIR": str(self.folder / "tmp"),
            "GENENGINE_CACHE": str(self.folder / "cache"),
        } | settings  # fmt: skip
        return subprocess.run(
            ["bash", str(self.root / "tools" / "gpu.sh"), str(self.stub), stage], env=environment, capture_output=True,
            text=True, timeout=120,
        )  # fmt: skip

    def calls(self, text=""):
        return [line for line in self.log.read_text().splitlines() if line.startswith("-m") and text in line]

    def state(self, part):
        """(stamp, exit status or "started") of the lines of that part, oldest first."""
        lines = (self.out / "state.txt").read_text().splitlines()
        return [tuple(line.split()[1:]) for line in lines if line.split()[0] == part]

    def installed(self, name):
        return (self.folder / "tmp" / "genengine-gpu" / "site" / "genengine" / name).read_text()


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_everything_runs_in_order_and_ends_in_one_archive(checkout):
    done = checkout.run()
    assert done.returncode == 0, done.stdout + done.stderr
    calls = checkout.calls()
    firsts = [next(i for i, call in enumerate(calls) if text in call) for text in (
        "pip install", "genengine verify", "-m pytest", "bench ceilings", "bench adaln", "profile adaln", "report",
    )]  # fmt: skip
    assert firsts == sorted(firsts)
    assert "--no-deps --no-build-isolation --no-index" in calls[firsts[0]]
    with tarfile.open(checkout.out / "gpu.tar.gz") as archive:
        names = archive.getnames()
    assert {"./state.txt", "./verify.log", "./bench-adaln.log"} <= set(names)


def test_kernels_that_may_hang_are_verified_alone_and_last(checkout):
    done = checkout.run("verify")
    calls = checkout.calls("genengine verify")
    assert [call.split("verify ")[1].split(" --device")[0] for call in calls] == [
        "--skip pixelcnn_sample --skip attention", "pixelcnn_sample", "attention",
    ], done.stdout  # fmt: skip


def test_a_failure_costs_its_part_and_only_that_is_done_again(checkout):
    assert checkout.run(FAIL="genengine verify").returncode == 1
    assert [code for _, code in checkout.state("verify")] == ["started", "3"] and checkout.calls("-m pytest")
    done = checkout.run()
    assert done.returncode == 0 and "test: done before" in done.stdout
    assert checkout.calls("genengine verify") and not checkout.calls("-m pytest") and not checkout.calls("pip install")
    checkout.run("test", FORCE="1")
    assert checkout.calls("-m pytest")


def test_every_other_source_is_installed_and_shown_anew(checkout):
    """A commit, an edit, a file that git does not know yet, an extension that was brought along."""
    changes = [
        lambda: checkout.commit("second"),
        lambda: checkout.write("__init__.py", "edited = 1"),
        lambda: checkout.write("__init__.py", "edited = 2"),
        lambda: checkout.write("new.py", "1"),
        lambda: checkout.write("new.py", "2"),
        lambda: checkout.write("_C.abi.so", "compiled"),
    ]
    checkout.run("verify")
    for number, change in enumerate(changes, start=2):
        change()
        checkout.run("verify")  # a stage that is not the installation
        assert checkout.calls("pip install") and checkout.calls("genengine verify"), number
        assert len({stamp for stamp, _ in checkout.state("verify")}) == number
    assert checkout.installed("__init__.py") == "edited = 2" and checkout.installed("new.py") == "2"
    checkout.run("verify")
    assert not checkout.calls("pip install") and not checkout.calls("genengine verify")


def test_stamps_tell_the_commit_and_whether_it_was_edited(checkout):
    checkout.run("verify")
    assert checkout.state("verify")[0][0].startswith(checkout.git("rev-parse", "--short=12", "HEAD") + "-")
    assert checkout.calls("genengine verify")[0].endswith("dirty=0")
    checkout.write("new.py", "")
    checkout.run("verify")
    assert checkout.calls("genengine verify")[0].endswith("dirty=1")


def test_without_git_the_files_themselves_are_compared(checkout):
    shutil.rmtree(checkout.root / ".git")
    checkout.run("verify", GENENGINE_COMMIT="abc", GENENGINE_DIRTY="1")
    assert re.fullmatch("abc-[0-9a-f]{12}", checkout.state("verify")[0][0])
    assert checkout.calls("genengine verify")[0].endswith("dirty=1")
    checkout.run("verify", GENENGINE_COMMIT="abc")
    assert not checkout.calls("genengine verify")
    checkout.write("__init__.py", "edited")
    checkout.run("verify", GENENGINE_COMMIT="abc")
    assert checkout.calls("genengine verify")


def test_nothing_runs_on_a_source_that_could_not_be_installed(checkout):
    shutil.rmtree(checkout.root / "kernels")  # nor can it be laid out by hand
    done = checkout.run("verify", FAIL="pip install")
    assert done.returncode == 1 and "could not be installed" in done.stderr and not checkout.calls("genengine verify")


def test_where_pip_fails_the_package_is_laid_out_by_hand(checkout):
    assert checkout.run("verify", FAIL="pip install").returncode == 0
    assert checkout.calls("genengine verify") and checkout.installed("__init__.py") == ""


def test_a_hang_costs_one_op_which_goes_on_where_it_stopped(checkout):
    done = checkout.run("ops", HANG="bench adaln", OPS_LIMIT="1")
    assert done.returncode == 1 and "bench-adaln: stopped after 1 s" in done.stdout
    assert checkout.state("bench-adaln")[-1][1] == "124" and checkout.state("bench-glu")[-1][1] == "0"
    assert not checkout.calls("--resume")
    assert checkout.run("ops").returncode == 0
    assert checkout.calls("bench adaln")[0].split()[-2] == "--resume" and not checkout.calls("bench glu")


def test_rows_of_other_edits_are_not_gone_on_with(checkout):
    checkout.run("ops", FAIL="bench adaln")
    checkout.write("__init__.py", "edited")
    checkout.run("ops", FAIL="bench adaln")
    assert checkout.calls("bench adaln") and not checkout.calls("--resume")
    checkout.run("ops", FORCE="1")
    assert not checkout.calls("--resume")


def test_a_killed_part_is_told_from_a_failed_one(checkout):
    done = checkout.run("ops", KILL="bench adaln")
    assert done.returncode == 1 and "bench-adaln: killed, for memory or as it did not stop after 400 s" in done.stdout
    assert checkout.state("bench-adaln")[-1][1] == "137"


def test_a_row_that_fails_fails_its_part(checkout):
    checkout.run("ops")
    assert len(checkout.calls("bench adaln")) == 1 and "--strict" in checkout.calls("bench adaln")[0]
    assert f"--save {checkout.out}/results" in checkout.calls("bench adaln")[0]


@pytest.mark.parametrize(("settings", "code"), [({"FAIL": "--list"}, "3"), ({"NAMELESS": "1"}, "1")])
def test_a_stage_whose_parts_cannot_be_listed_fails(checkout, settings, code):
    done = checkout.run("ops", **settings)
    assert done.returncode == 1 and "list-ops: exit status" in done.stdout
    assert checkout.state("list-ops")[-1][1] == code
    assert "exit status" in (checkout.out / "list-ops.log").read_text()


def test_one_stage_alone(checkout):
    checkout.run("ceilings")
    assert checkout.calls("bench ceilings") and not checkout.calls("verify")
    done = checkout.run("everything")
    assert done.returncode == 2 and "STAGE must be one of" in done.stderr and not checkout.calls()


def test_each_tool_of_compute_sanitizer_runs_every_case_set(checkout):
    assert "there is no compute-sanitizer" in checkout.run("sanitize").stdout
    tool = checkout.folder / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        '#!/usr/bin/env bash\n[ "$2" != "${FAIL_TOOL:-}" ] || code=9\n'
        'echo "-m sanitizer $* caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING" >>"$CALLS"\nexit ${code:-0}\n'
    )
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    assert checkout.run("sanitize", PATH=path, FAIL_TOOL="racecheck").returncode == 1
    calls = checkout.calls("sanitizer --tool")
    assert [call.split()[3] for call in calls] == ["memcheck", "racecheck", "initcheck"]
    assert all("genengine verify" in call and call.endswith("caching off: 1") for call in calls)
    assert [code for _, code in checkout.state("sanitize-racecheck")] == ["started", "9"]
    checkout.run("sanitize", PATH=path)
    assert len(checkout.calls("sanitizer --tool")) == 1  # the two that passed are not repeated


def test_the_goals_are_run_by_the_commands_of_their_page(checkout):
    """Labels with spaces arrive whole."""
    line = "genengine bench ops --label 'SDXL, 1,024 images'"
    listing = f'case "$*" in\n  *gpu_goals.py*) printf \'ops\\t%s\\n\' "{line}"; exit 0 ;;'
    words = 'printf "<%s>" "$@" >>"$CALLS.words"\necho "$* dirty'
    checkout.stub.write_text(STUB.replace('case "$*" in', listing).replace('echo "$* dirty', words))
    assert checkout.run("goals").returncode == 0
    assert "<bench><ops><--label><SDXL, 1,024 images><--device>" in Path(f"{checkout.log}.words").read_text()
    assert [code for _, code in checkout.state("goals-ops")] == ["started", "0"]
