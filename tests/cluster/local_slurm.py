"""A real Slurm on this one machine: its own munge, controller and N nodes on loopback, all in one folder.

Nothing outside the folder is written, an installed Slurm's own configuration is not touched, and every process is
gone afterwards. Partition `all` has further nodes that exist in the configuration only (as cloud nodes do until they
are needed), so that `sbatch --test-only` can judge a launcher of the size it has by default.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("sbatch", "srun", "scontrol", "squeue", "scancel", "slurmctld", "slurmd", "munged", "mungekey")
CONFIGURED_NODES = 64
FIRST_PORT, PORTS_IN_A_ROW, NUM_RANGES = 16_000, 100, 70  # below what systems give out by themselves
# A job's ranks meet at a port that follows from its number (launch/common.sh): one of the same row, behind the nodes'.
FIRST_JOB, LAUNCHERS_PORT = 70, 12_000
START_S, STOP_S = 60.0, 20.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=3600
SlurmdParameters=config_overrides
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=-1
NodeName=DEFAULT CPUs=112 RealMemory=4000 Gres=gpu:h100:8
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last_started}] State=UNKNOWN
NodeName=n[{not_started}-{configured}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_cloud}-{last}] State=CLOUD
PartitionName=batch Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP
PartitionName=all Nodes=ALL MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Say why no Slurm can be started here; None where one can."""
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=search) is None]
    if missing:
        return f"no local Slurm: {', '.join(missing)} not found (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "no local Slurm: slurmd starts jobs as root only"


@dataclass(frozen=True)
class LocalSlurm:
    """A running cluster: what a user at its login node would do."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that make Slurm's commands talk to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}

    def command(self, *arguments: str, cwd: Path | None = None, **environment: str) -> str:
        """Run one of Slurm's commands and return what it printed; raises RuntimeError with its error output."""
        everything = {**os.environ, **self.environment, **environment}
        ended = subprocess.run(arguments, env=everything, cwd=cwd, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"{' '.join(arguments)} ended with {ended.returncode}: {ended.stderr}")
        return ended.stdout + ended.stderr

    def submit(self, launcher: Path, arguments: Sequence[str], cwd: Path, **environment: str) -> int:
        """Submit a launcher and return the job's number."""
        printed = self.command("sbatch", "--parsable", *arguments, str(launcher), cwd=cwd, **environment)
        return int(printed.split()[-1])

    def idle_nodes(self) -> int:
        """Return how many nodes have nothing to do, not even to clean up after a job."""
        with contextlib.suppress(RuntimeError):
            return int(self.command("sinfo", "-h", "-p", "batch", "-t", "idle", "-o", "%D").strip() or 0)
        return 0

    def job(self, number: int | str) -> Mapping[str, str]:
        """Return what `scontrol show job` says of a job."""
        for attempt in range(10):
            with contextlib.suppress(RuntimeError):  # a busy controller drops a connection now and then
                words = self.command("scontrol", "--oneliner", "show", "job", str(number)).split()
                break
            time.sleep(0.2 * attempt)
        else:
            raise RuntimeError(f"the controller says nothing of job {number}")
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: int | str, states: Sequence[str] = ENDED, timeout_s: float = 240.0) -> Mapping[str, str]:
        """Wait until a job is in one of the states and return the job; a requeued job is let start soon."""
        deadline, was_put_off = time.monotonic() + timeout_s, True
        while time.monotonic() < deadline:
            job = self.job(number)
            if job["JobState"] in states:
                return job
            waits = was_put_off and job["JobState"] == "PENDING" and job["Reason"] == "BeginTime"
            # A requeued job waits two minutes, so that the nodes can recover: one that starts before its last node has
            # revoked its credential fails. Busy nodes take as long as they take; that all are done can be seen.
            if waits and self.idle_nodes() == len(list(self.folder.glob("n*.pid"))):
                self.command("scontrol", "update", f"JobId={number}", "StartTime=now+5seconds")
                was_put_off = False
            time.sleep(0.5)  # each look is a process of Slurm's
        raise TimeoutError(
            f"job {number} is not {' or '.join(states)} after {timeout_s:.0f} s: {dict(self.job(number))}"
        )


@contextlib.contextmanager
def local_slurm(folder: Path, nodes: int) -> Iterator[LocalSlurm]:
    """Start a cluster of `nodes` in `folder`, hand it out, and end every process of it."""
    folder.mkdir(parents=True, exist_ok=True)
    slurm = LocalSlurm(folder)
    names = [f"n{number}" for number in range(1, nodes + 1)]
    reserved, port = _reserve_ports(nodes)
    _write_configuration(folder, names, port)
    try:
        _start_munge(folder)
        slurm.command("slurmctld", "-f", str(folder / "slurm.conf"))
        for name in names:
            slurm.command("slurmd", "-f", str(folder / "slurm.conf"), "-N", name)
        _wait_for_idle(slurm, nodes)
        yield slurm
    finally:
        _stop(slurm, names)
        reserved.close()


def _reserve_ports(nodes: int) -> tuple[socket.socket, int]:
    """Return the first of PORTS_IN_A_ROW ports, which no other cluster of these tests takes while the socket is open.

    It holds the first as a UDP port: Slurm wants the TCP ones.
    """
    for attempt in range(NUM_RANGES):
        first = FIRST_PORT + PORTS_IN_A_ROW * ((os.getpid() + attempt) % NUM_RANGES)
        reserved = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            reserved.bind(("127.0.0.1", first))
            for port in range(first, first + nodes + 1):
                with socket.socket() as tried:
                    tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    tried.bind(("127.0.0.1", port))
        except OSError:  # another suite's, or somebody else's
            reserved.close()
        else:
            return reserved, first
    raise RuntimeError(f"no {nodes + 1} free ports in a row between {FIRST_PORT} and {first}")


def _write_configuration(folder: Path, names: Sequence[str], port: int) -> None:
    (folder / "state").mkdir()
    for name in names:
        (folder / "spool" / name).mkdir(parents=True)
    host, nodes = socket.gethostname().split(".")[0], len(names)
    conf = CONF.format(
        host=host, port=port, folder=folder, user=getpass.getuser(), configured=CONFIGURED_NODES, nodes=nodes,
        not_started=nodes + 1, first=port + 1, last_started=port + nodes, first_cloud=port + nodes + 1,
        last=port + CONFIGURED_NODES, first_job=port + FIRST_JOB - LAUNCHERS_PORT,
    )  # fmt: skip
    (folder / "slurm.conf").write_text(conf)
    for number in range(8):
        (folder / f"gpu{number}").touch()  # what Slurm counts as a GPU is a file
    line = f"NodeName=n[1-{CONFIGURED_NODES}] Name=gpu Type=h100 File={folder}/gpu[0-7]\n"
    (folder / "gres.conf").write_text(line)


def _start_munge(folder: Path) -> None:
    """Start an own munge: its socket and key lie in the folder."""
    search = os.environ["PATH"] + ":/usr/sbin:/sbin"
    key = folder / "munge.key"
    subprocess.run([shutil.which("mungekey", path=search) or "mungekey", "--create", f"--keyfile={key}"], check=True)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder}/munge.{ending}" for option, ending in files.items()]
    # --force: the folder's parents may be writable by others, as /tmp is.
    subprocess.run(
        [shutil.which("munged", path=search) or "munged", "--force", *options], check=True, stderr=subprocess.DEVNULL
    )


def _wait_for_idle(slurm: LocalSlurm, nodes: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if slurm.idle_nodes() == nodes:
            return
        time.sleep(0.2)
    log = (slurm.folder / "slurmctld.log").read_text()[-2000:]
    raise TimeoutError(f"{nodes} nodes are not idle after {START_S:.0f} s; the controller's log ends with\n{log}")


def _stop(slurm: LocalSlurm, names: Sequence[str]) -> None:
    """Cancel what runs, end the daemons, and wait until none of their processes is left."""
    with contextlib.suppress(RuntimeError):
        slurm.command("scancel", "--user", getpass.getuser())
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline and slurm.command("squeue", "-h", "--states=all").count(" CG "):
            time.sleep(0.2)
    pid_files = [slurm.folder / f"{name}.pid" for name in (*names, "slurmctld", "munge")]
    pids = [int(file.read_text()) for file in pid_files if file.exists()]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while time.monotonic() < deadline and processes_of(slurm.folder):
        time.sleep(0.1)
    for pid in processes_of(slurm.folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes_of(folder: Path) -> list[int]:
    """List the processes that have the folder's Slurm configuration in their environment or command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        if entry.name == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):
            known = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            if f"{folder}/".encode() in known:
                found.append(int(entry.name))
    return found
