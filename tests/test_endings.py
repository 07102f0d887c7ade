"""Whatever stops a command, its user reads one line, and nothing half-written is left."""

import os
import signal
import subprocess
import sys

import pytest

from paths import ROOT
from proscale_hf import endings
from proscale_hf.cli.command_line import OneLineParser, Subcommand, carry_out
from proscale_hf.cli.console import CommandError


def status_of_command(run):
    command = Subcommand("do", help="", description="", add_options=lambda parser: None, run=lambda options: run())
    return carry_out(OneLineParser(command, prog="do"), [])


def interrupt():
    signal.raise_signal(signal.SIGINT)


def interrupt_that_a_library_changes():
    try:
        interrupt()
    except KeyboardInterrupt:
        raise ImportError("a module failed to import") from None


def failing(error):
    def run():
        raise error

    return run


@pytest.fixture
def interrupts():
    """As at a terminal; where the tests run in the background, interrupts are ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(
    ("run", "status", "line"),
    [
        (interrupt, 130, "interrupted"),
        (interrupt_that_a_library_changes, 130, "interrupted"),
        (failing(KeyboardInterrupt()), 130, "interrupted"),
        (failing(MemoryError("Unable to allocate 3 TiB")), 1, "error: there is not enough memory (Unable to allocate"),
        (failing(RuntimeError("DefaultCPUAllocator: not enough memory: a")), 1, "error: there is not enough memory"),
        (failing(OSError(28, "No space left on device")), 1, "error: [Errno 28] No space left"),
        (failing(CommandError("no \x1b[31m\udcff file", exit_code=2)), 2, r"error: no \x1b[31m\udcff file"),
        (failing(CommandError("a\nb", keep_lines=True)), 1, "error: a\nb"),
    ],
)
def test_one_line(run, status, line, capsys, interrupts, monkeypatch):
    monkeypatch.setattr(endings, "forget_output", lambda: None)  # it would take the tests' own
    monkeypatch.setattr("proscale_hf.cli.command_line.forget_output", lambda: None)
    handler = signal.getsignal(signal.SIGINT)
    assert status_of_command(run) == status
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith(line) and errors.count("\n") == line.count("\n") + 1
    assert signal.getsignal(signal.SIGINT) is handler


def test_mistakes_in_the_code_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        status_of_command(lambda: 1 / 0)
    with pytest.raises(SystemExit):
        status_of_command(failing(SystemExit(0)))


SLOW_MODULE = "import time\nprint('importing', flush=True)\ntime.sleep(60)"
PROGRAM = """
import sys, time
from proscale_hf.endings import end_well
end_well()
from proscale_hf.files.whole import write_whole

def wait(file):
    print("writing", flush=True)
    time.sleep(60)

match sys.argv[1]:
    case "import":
        import slow_module
    case "import while writing":
        write_whole("file", lambda file: __import__("slow_module"))
    case "write":
        write_whole("file", wait)
    case "print":
        for _ in range(100_000):
            print("a line that is long enough to fill a pipe soon")
    case "allocate":
        bytearray(2**62)
    case "say":
        print("B\\xe4r", sys.argv[2])
    case "fail":
        1 / 0
"""


def start(folder, *arguments, **options):
    (folder / "slow_module.py").write_text(SLOW_MODULE)
    (folder / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, "program.py", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, restore_signals=True, **streams)


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="interrupts are ignored here")
@pytest.mark.parametrize("moment", ["import", "import while writing", "write"])
def test_an_interrupt_at_any_moment(tmp_path, moment):
    with start(tmp_path, moment) as process:
        assert process.stdout.readline()  # it is there
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"interrupted\n")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["program.py", "slow_module.py"]


def test_a_reader_that_has_gone(tmp_path):
    with start(tmp_path, "print") as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "options", "status", "output", "errors"),
    [
        (["allocate"], {}, 1, b"", b"error: there is not enough memory (MemoryError); try smaller images"),
        (["say", b"\xff"], {"env": {"PYTHONIOENCODING": "ascii"}}, 0, rb"B\xe4r \udcff", b""),
        (["say", "x"], {"preexec_fn": lambda: os.close(1)}, 0, b"", b""),
        (["fail"], {"preexec_fn": lambda: os.close(2)}, 1, b"", b""),
        (["fail"], {}, 1, b"", b"Traceback"),
    ],
    ids=["memory", "ascii", "no stdout", "no stderr", "mistake"],
)
def test_other_ends(tmp_path, arguments, options, status, output, errors):
    with start(tmp_path, *arguments, **options) as process:
        printed = process.communicate(timeout=60)
    assert process.returncode == status
    assert printed[0].strip() == output and printed[1].startswith(errors)


def test_deaf_children(interrupts):
    handler = signal.getsignal(signal.SIGINT)
    with endings.deaf_children():
        child = [sys.executable, "-c", "import signal; signal.raise_signal(signal.SIGINT); print('on')"]
        assert subprocess.run(child, capture_output=True).stdout == b"on\n"
    assert signal.getsignal(signal.SIGINT) is handler
