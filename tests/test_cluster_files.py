"""The files of `cluster/`: Kubernetes against KubeRay's schema, `ray up` against Ray's, the shell scripts as far as they run
without a cluster. The Slurm script runs with stand-ins for `srun`, `ip` and `ray`."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.aws import config as aws

from diffprune.cli.commands import app
from diffprune.distributed.cluster import MOST_TMPDIR
from diffprune.io.job_files import REPOSITORY

CLUSTER = REPOSITORY / "cluster"
KUBERAY = json.loads((Path(__file__).parent / "kuberay_schema.json").read_text())
RAY_UP = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
NAMES = {"type": "object", "additionalProperties": {"type": "string"}}
META = {"type": "object", "required": ["name"], "properties": {"labels": NAMES}}


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(properties)}


PEER = {"type": "object", "additionalProperties": False, "properties": {"namespaceSelector": {}, "podSelector": {}}}
RULE = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "from": {"type": "array", "items": PEER},
        "ports": {"type": "array", "items": closed(port={"type": "integer"}, protocol={"enum": ["TCP", "UDP"]})},
    },
}
KUBERNETES = {  # the fields we use, as the reference of Kubernetes documents them
    "Namespace": closed(apiVersion={"const": "v1"}, kind={}, metadata=META),
    "PersistentVolumeClaim": closed(
        apiVersion={"const": "v1"},
        kind={},
        metadata=META,
        spec=closed(
            accessModes={"type": "array", "items": {"enum": ["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"]}},
            resources=closed(requests=closed(storage={"type": "string", "pattern": "^[0-9]+[KMGT]i$"})),
        ),
    ),
    "NetworkPolicy": closed(
        apiVersion={"const": "networking.k8s.io/v1"},
        kind={},
        metadata=META,
        spec=closed(
            podSelector={"type": "object"},
            policyTypes={"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
            ingress={"type": "array", "items": RULE},
        ),
    ),
}
ANYSCALE = (  # of its job reference
    "name image_uri containerfile compute_config working_dir excludes requirements env_vars py_modules cloud project ray_version "
    "registry_login_secret entrypoint max_retries job_queue_config timeout_s tags"
).split()


def read(name: str) -> list[Any]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def faults(thing: Any) -> list[str]:
    """What a schema finds wrong with one Kubernetes object."""
    kind = thing["kind"]
    schema = KUBERNETES.get(kind) or {"$ref": f"#/$defs/{kind}", "$defs": KUBERAY["$defs"]}
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(thing)]


def cluster_of(name: str) -> dict[str, Any]:
    spec = read(name)[0]["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(group, its start parameters, pod template) of every kind of pod."""
    spec, cluster = read(name)[0]["spec"], cluster_of(name)
    yield "head", cluster["headGroupSpec"]["rayStartParams"], cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["rayStartParams"], group["template"]
    if "submitterPodTemplate" in spec:
        yield "submitter", {}, spec["submitterPodTemplate"]


FILES = ("namespace.yaml", "rayjob.yaml", "raycluster.yaml")
RUNS = ("rayjob.yaml", "raycluster.yaml")


@pytest.mark.parametrize("name", FILES)
def test_kubernetes_takes_the_file(name: str) -> None:
    for thing in read(name):
        assert not faults(thing)


def keys(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key that is a field, not a name of the user's."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if isinstance(tree, dict):
            yield (*path, key)
        if key not in (
            "labels",
            "rayStartParams",
            "matchLabels",
            "metadata",
            "requests",
            "limits",
            "podSelector",
            "namespaceSelector",
        ):
            yield from keys(value, (*path, key))


@pytest.mark.parametrize("name", FILES)
def test_every_misspelt_field_is_seen(name: str) -> None:
    for thing in read(name):
        for *parents, leaf in keys(thing):
            if leaf == "kind":
                continue
            spoilt = copy.deepcopy(thing)
            here = spoilt
            for part in parents:
                here = here[part]
            here[f"{leaf}z"] = here.pop(leaf)
            assert faults(spoilt), (parents, leaf)


@pytest.mark.parametrize("name", RUNS)
def test_pods_are_closed_and_share_one_claim(name: str) -> None:
    claim = next(thing for thing in read("namespace.yaml") if thing["kind"] == "PersistentVolumeClaim")
    policy = next(thing for thing in read("namespace.yaml") if thing["kind"] == "NetworkPolicy")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    admitted = policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    for group, start, template in pods(name):
        spec, (container,) = template["spec"], template["spec"]["containers"]
        assert admitted.items() <= template["metadata"]["labels"].items(), group
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"} and not spec["automountServiceAccountToken"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert set(container["resources"]) == {"requests", "limits"}
        if group == "submitter":
            continue
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        memory = mounts["/dev/shm"]["emptyDir"]
        assert memory["medium"] == "Memory"
        assert int(start["object-store-memory"]) < int(memory["sizeLimit"].removesuffix("Gi")) * 2**30
        assert {e["name"] for e in container["env"] if e["value"].startswith("/shared/")} == {"HF_HOME", "DIFFPRUNE_DATA"}


@pytest.mark.parametrize("name", RUNS)
def test_the_cluster_asks_for_a_token_and_gpus(name: str) -> None:
    spec = cluster_of(name)
    assert spec["rayVersion"] == PINS["ray"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "diffprune-token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = spec["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"] and resources["limits"]["nvidia.com/gpu"] == 1
    assert group["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"


def started(line: str) -> Any:
    """What `diffprune ...` on a command line means."""
    verb, *arguments = shlex.split(line)[1:]
    return app.commands[verb].make_context(verb, arguments).params


def test_a_job_ends_and_is_tried_again() -> None:
    spec = read("rayjob.yaml")[0]["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0, "the one does nothing without the other"
    assert spec["backoffLimit"] > 0 and spec["submitterConfig"]["backoffLimit"] > 0
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    assert spec["submissionMode"] == "K8sJobMode"
    asked = started(spec["entrypoint"])
    assert asked["job"] == "demo" and asked["out"].is_relative_to("/shared") and asked["address"] is None
    assert asked["gpus"] == 1, "the workers' nodes have GPUs, and a job that does not say how many it wants is refused there"


def shown() -> list[str]:
    """Every command of the pages and comments of `cluster/` that runs a job on more machines."""
    section = (CLUSTER / "README.md").read_text().partition("\n### Kubernetes")[2]
    texts = [section, *(path.read_text() for path in sorted(CLUSTER.iterdir()) if path.suffix in (".yaml", ".sh"))]
    return re.findall(r"(?:diffprune (?:run|submit)|cluster/slurm\.sh) (?:demo|JOB)\b[^`\n]*", "\n".join(texts))


def test_every_command_for_a_cluster_says_how_many_gpus_a_worker_gets() -> None:
    lines = shown()
    assert len(lines) >= 9 and {line.split()[0] for line in lines} == {"diffprune", "cluster/slurm.sh"}
    assert [line for line in lines if "--gpus 1" not in line] == []


def ray_start_options() -> set[str]:
    from ray.scripts.scripts import start

    return {name for parameter in start.params for name in parameter.opts}


def test_ray_up_takes_the_file() -> None:
    (found,) = read("aws.yaml")
    jsonschema.validate(found, RAY_UP)
    assert found["head_node_type"] in found["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found | {"head_node_typ": "head"}, RAY_UP)
    mounted = next(iter(found["file_mounts"]))
    for commands in (found["head_start_ray_commands"], found["worker_start_ray_commands"]):
        line = commands[-1]
        assert f"test -s {mounted}/auth_token" in line, "an empty token file is refused"
        assert re.search(rf"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={mounted}/auth_token (\w+=\S+ )*ray start", line)
        assert "RAY_enable_metrics_collection=0" in line, "metrics ports are on the node's private address or off"
        assert set(re.findall(r"(?<=\s)--[a-z-]+", line)) <= ray_start_options()
    assert "AUTOSCALER_METRIC_PORT=-1 DASHBOARD_METRIC_PORT=-1" in found["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in found["head_start_ray_commands"][-1]
    assert "security_group" not in found["provider"], "Ray adds a rule to it that lets SSH in from everywhere"
    kinds = [kind["node_config"] for kind in found["available_node_types"].values()]
    assert all(kind["SecurityGroupIds"] == ["sg-0123456789abcdef0"] and kind["ImageId"].startswith("ami-") for kind in kinds)
    assert aws._configure_security_group(copy.deepcopy(found)) == found, "groups of one's own are left as they are"
    rules = (CLUSTER / "README.md").read_text()
    assert re.search(r"--protocol tcp --port 22 --cidr [\d.]+/32", rules) and '--protocol=-1 --source-group "$group"' in rules
    assert not re.search(r"[0-9a-f]{64}", (CLUSTER / "aws.yaml").read_text()), "a token"
    everything = [*found["setup_commands"], *found["head_setup_commands"], *found["worker_setup_commands"]]
    assert not any("pip" in line.split() for line in everything), "a login shell's pip is not that of the image, which has all"


def test_programs_of_the_image_are_found_from_login_shells_and_buckets_need_nothing_more(own_folder: Path) -> None:
    """`ray up` runs `bash --login -c -i ...`, where Debian's /etc/profile sets PATH anew and then reads /etc/profile.d."""
    text = (CLUSTER / "Dockerfile").read_text()
    (step,) = re.findall(r"^RUN (echo .* )>/etc/profile\.d/diffprune\.sh$", text, re.MULTILINE)
    subprocess.run(["bash", "-c", f"{step} >profile"], check=True)
    reset = 'PATH=/usr/local/bin:/usr/bin:/bin; . ./profile; echo "$PATH"'
    assert (
        subprocess.run(["bash", "-c", reset], capture_output=True, text=True).stdout
        == "/opt/venv/bin:/usr/local/bin:/usr/bin:/bin\n"
    )
    for place, install in (("image", text), ("Slurm", (CLUSTER / "README.md").read_text().partition("### Slurm")[2])):
        assert re.search(r"pip install -c constraints\.txt ['\"]\.\[s3,objects\]['\"]", install), place
    assert {"boto3", "obstore"} <= set(PINS)


def test_anyscale_takes_the_file() -> None:
    (found,) = read("anyscale.yaml")
    assert set(found) <= set(ANYSCALE)
    asked = started(found["entrypoint"])
    assert asked["address"] == "auto" and asked["out"].is_relative_to("/mnt/shared_storage") and asked["gpus"] == 1


def test_the_image_is_made_of_what_there_is() -> None:
    text = re.sub(r"\\\n\s*", " ", (CLUSTER / "Dockerfile").read_text())
    steps = [line.split(" ", 1) for line in text.splitlines() if re.match(r"[A-Z]+ ", line)]
    copied = [shlex.split(rest)[:-1] for word, rest in steps if word == "COPY" and "--from" not in rest]
    allowed = [line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(one.removeprefix("./") for line in copied for one in line) == sorted(allowed)
    assert all((REPOSITORY / one).exists() for one in allowed)
    assert [rest for word, rest in steps if word == "USER"][-1] == "1000:1000"
    assert "torch" in PINS and sum("-c constraints.txt" in rest for _, rest in steps) == 1
    python = next(rest for word, rest in steps if word == "ARG").partition("=")[2]
    assert f'requires-python = ">={python}"' in (REPOSITORY / "pyproject.toml").read_text()


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path) -> None:
    for reader in (["bash", "-n"], ["shellcheck"])[: 1 + bool(shutil.which("shellcheck"))]:
        found = subprocess.run([*reader, script], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr


def test_a_head_by_hand_has_a_token_first(own_folder: Path) -> None:
    """Without one `ray start` refuses, as RAY_AUTH_MODE asks for it; one that is there stays."""
    block = (CLUSTER / "README.md").read_text().partition("By hand, the same as `local.sh`:\n\n```\n")[2].partition("\n```")[0]
    first, token = block.splitlines()[0], own_folder / ".ray" / "auth_token"
    for _ in range(2):
        subprocess.run(["bash", "-c", first], env=os.environ | {"HOME": str(own_folder)}, check=True)
        made = token.read_text()
        assert re.fullmatch("[0-9a-f]{64}", made) and token.stat().st_mode & 0o777 == 0o600
        token.write_text("f" * 64)
    assert made == "f" * 64


STAND_INS = {
    "ip": """case "$*" in
        *route*) [ -n "${ROUTELESS:-}" ] || echo "default via 10.0.0.1 dev eth7 proto dhcp" ;;
        *"dev "|*ib0*) echo "Device \\"$6\\" does not exist." >&2; exit 1 ;;
        *) echo "3: $6 inet 10.0.0.5/24 scope global" ;;
    esac""",
    "srun": """printf "%s\\n" "$@" >"$OUT/srun"
    while [[ $1 == --* ]]; do shift; done
    for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done""",
    "ray": """printf "%s\\n" "$@" >"$OUT/arguments"
    env >"$OUT/environment"
    stat -c %a "$RAY_TMPDIR" >"$OUT/mode"
    [ -n "${FAILS:-}" ] || python "$OUT/symmetric_run.py" "$@"
    [ -z "${FAILS:-}" ] && [ $SLURM_NODEID = 0 ] && while [ "$1" != -- ]; do shift; done && "${@:2}"
    exit ${FAILS:-0}""",
}


SYMMETRIC_RUN = """
import os, sys
from ray._common.utils import get_default_ray_temp_dir
from ray._private import services, utils
ours = sys.argv[1 : sys.argv.index("--")]
folder = ours[ours.index("--temp-dir") + 1] if "--temp-dir" in ours else get_default_ray_temp_dir()
os.makedirs(folder, exist_ok=True)
utils.write_ray_address(address := ours[ours.index("--address") + 1], folder)  # as `ray start --head` does
with open(os.environ["OUT"] + "/found", "w") as file:  # by the `ray.init()` that waits for the other nodes
    print(address, services.canonicalize_bootstrap_address(None, None), folder, file=file)
"""


@pytest.fixture
def slurm(own_folder: Path) -> Any:
    """Runs the script as Slurm would on the first node, every foreign command a stand-in."""
    tools = own_folder / "tools"
    tools.mkdir()
    for name, text in STAND_INS.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    (tools / "python").write_text(
        f'#!/bin/bash\n[ "$1" = -m ] && echo "ran $*" && exit\n[ "$1" = -c ] && cd {REPOSITORY}\nexec {sys.executable} "$@"\n'
    )
    (tools / "python").chmod(0o755)
    (own_folder / "symmetric_run.py").write_text(SYMMETRIC_RUN)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_"))}
        path = {"PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(own_folder), "RAY_ADDRESS": "elsewhere:6379"}
        node = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2", "SLURM_CPUS_ON_NODE": "8", "SLURM_GPUS_ON_NODE": "4"}
        everything = outside | path | node | environment
        return subprocess.run([CLUSTER / "slurm.sh", *arguments], env=everything, capture_output=True, text=True, timeout=300)

    return run


def test_slurm_starts_one_ray_for_the_job(slurm: Any, own_folder: Path) -> None:
    shared = own_folder / "shared"
    done = slurm("demo", "--gpus", "1", "--limit", "8", SHARED=str(shared))
    assert done.returncode == 0, done.stderr
    arguments = (own_folder / "arguments").read_text().splitlines()
    ours, inner = arguments[: (end := arguments.index("--"))], arguments[end + 1 :]
    address = ours[ours.index("--address") + 1]
    assert ours[0] == "symmetric-run" and ours[ours.index("--min-nodes") + 1] == "2"
    assert set(re.findall(r"--[a-z-]+", " ".join(ours))) <= ray_start_options() | {"--min-nodes"}
    assert "--cpu-bind=none" in (own_folder / "srun").read_text().split(), "else Ray may have one core of those it is told of"
    assert done.stdout == f"ran {shlex.join(inner[inner.index('-m') :])}\n", "on the first node alone"
    assert re.fullmatch(r"10\.0\.0\.5:2\d{4}", address), "the first node's, outside Ray's worker ports"
    asked = started(shlex.join(inner[inner.index("diffprune") :]))
    assert (asked["job"], asked["limit"], asked["address"], asked["out"]) == ("demo", 8, address, shared / "runs")
    assert asked["gpus"] == 1
    started_at, found, folder = (own_folder / "found").read_text().split()
    assert started_at == found == address, "Ray's own command finds the Ray that it has started, and starts no other"
    environment = dict(line.partition("=")[::2] for line in (own_folder / "environment").read_text().splitlines())
    assert environment["RAY_AUTH_MODE"] == "token" and environment["RAY_AUTH_TOKEN_PATH"] == str(shared / "auth_token")
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "eth7"
    off = {"RAY_enable_metrics_collection": "0", "AUTOSCALER_METRIC_PORT": "-1", "DASHBOARD_METRIC_PORT": "-1"}
    assert off.items() <= environment.items(), "else Ray's ports for metrics listen on every interface"
    assert "RAY_ADDRESS" not in environment and int(environment["RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT"]) >= 300
    assert (own_folder / "mode").read_text() == "700\n"
    private = Path(environment["RAY_TMPDIR"])
    assert Path(folder).parent == private and not private.exists(), "a node is left as it was found"
    longest = f"/tmp/dp-{2**32 - 1}-99"  # numbers of Slurm's jobs have 32 bits at most
    assert str(private).startswith("/tmp/dp-") and len(longest) <= MOST_TMPDIR, "below it lie sockets, whose paths are short"
    token = shared / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600 and token.read_text() not in done.stdout + done.stderr + " ".join(arguments)


def test_slurm_takes_the_folder_of_a_cancelled_job_when_its_ray_has_ended(slurm: Any, own_folder: Path) -> None:
    """Slurm sends SIGTERM to all processes of a step: the shell went first, and took the folder of a Ray that was still ending."""
    ending = """env >"$OUT/environment"
    kill -TERM $PPID
    sleep 1
    ls -d "$RAY_TMPDIR" >"$OUT/there"
    mkdir -p "$RAY_TMPDIR/logs"
    exit 130"""
    (own_folder / "tools" / "ray").write_text(f"#!/bin/bash\n{ending}\n")
    assert slurm("demo", SHARED=str(own_folder)).returncode == 130
    private = re.findall("^RAY_TMPDIR=(.*)$", (own_folder / "environment").read_text(), re.MULTILINE)[0]
    assert (own_folder / "there").read_text() == f"{private}\n" and not Path(private).exists()


def test_slurm_says_what_is_missing_and_passes_a_failure_on(slurm: Any, own_folder: Path) -> None:
    assert (slurm().returncode, "name a job" in slurm().stderr) == (2, True)
    without = slurm("demo")
    assert without.returncode == 2 and "SHARED is not set" in without.stderr
    (own_folder / "tools" / "python").rename(own_folder / "tools" / "python3")
    bare = own_folder / "bare"
    bare.mkdir()
    for name in ("bash", "mkdir", "awk", "dirname"):
        (bare / name).symlink_to(str(shutil.which(name)))
    nothing = slurm("demo", SHARED=str(own_folder), PATH=f"{own_folder}/tools:{bare}")
    assert (nothing.returncode, nothing.stderr.startswith("there is no python: set PYTHON")) == (2, True), nothing.stderr
    (own_folder / "tools" / "python3").rename(own_folder / "tools" / "python")
    for environment, says in (
        ({"ROUTELESS": "1"}, "this node has no default route: set IFNAME to the interface between the nodes\n"),
        ({"IFNAME": "ib0"}, "interface ib0 has no IPv4 address: set IFNAME\n"),
    ):
        lost = slurm("demo", SHARED=str(own_folder), **environment)
        assert (lost.returncode, lost.stderr) == (2, says)
    (own_folder / "auth_token").write_text("t" * 64)
    assert slurm("demo", SHARED=str(own_folder), FAILS="3").returncode == 3
    unstarted = slurm("demo", SHARED=str(own_folder), FAILS="0")  # as Ray's command ends where its head does not start
    assert (unstarted.returncode, "Ray did not start on the first node" in unstarted.stderr) == (1, True)
