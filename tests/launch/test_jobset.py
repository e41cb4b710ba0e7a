"""The JobSet for Kubernetes: fields of jobset.x-k8s.io/v1alpha2, batch/v1 and v1, and how they agree."""

from typing import Annotated, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from efficient_lm.composition import compose
from efficient_lm.config import RunConfig
from efficient_lm.training.group import group
from efficient_lm.validation import validate

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Count = Annotated[int, Field(ge=0)]


class Object(BaseModel):
    """Of Kubernetes: what it does not know it refuses."""

    model_config = ConfigDict(extra="forbid", strict=True)


class FieldRef(Object):
    fieldPath: str


class ValueFrom(Object):
    fieldRef: FieldRef


class Variable(Object):
    name: str
    value: str | None = None
    valueFrom: ValueFrom | None = None


class Resources(Object):
    limits: dict[str, int | str] = {}
    requests: dict[str, int | str] = {}


class Mount(Object):
    name: Name
    mountPath: str


class Container(Object):
    name: Name
    image: str
    command: list[str]
    env: list[Variable] = []
    resources: Resources = Resources()
    volumeMounts: list[Mount] = []


class Claim(Object):
    claimName: Name


class EmptyDir(Object):
    medium: Literal["", "Memory"] = ""


class Volume(Object):
    name: Name
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


class Pod(Object):
    restartPolicy: Literal["Never", "OnFailure"]
    terminationGracePeriodSeconds: Count
    nodeSelector: dict[str, str] = {}
    containers: list[Container]
    volumes: list[Volume] = []


class PodTemplate(Object):
    spec: Pod


class ExitCodes(Object):
    containerName: Name
    operator: Literal["In", "NotIn"]
    values: list[Annotated[int, Field(ge=1, le=255)]]


class PodFailureRule(Object):
    action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
    onExitCodes: ExitCodes


class PodFailurePolicy(Object):
    rules: list[PodFailureRule]


class JobSpec(Object):
    completionMode: Literal["Indexed", "NonIndexed"]
    completions: Count
    parallelism: Count
    backoffLimit: Count
    podFailurePolicy: PodFailurePolicy | None = None
    template: PodTemplate


class JobTemplate(Object):
    spec: JobSpec


class ReplicatedJob(Object):
    name: Name
    replicas: Count = 1
    template: JobTemplate


class Network(Object):
    enableDNSHostnames: bool
    subdomain: Name | None = None
    publishNotReadyAddresses: bool = True


class FailureRule(Object):
    name: Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    action: Literal["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
    onJobFailureReasons: list[
        Literal[
            "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"
        ]
    ]


class FailurePolicy(Object):
    maxRestarts: Count
    rules: list[FailureRule] = []


class JobSetSpec(Object):
    network: Network
    failurePolicy: FailurePolicy
    replicatedJobs: list[ReplicatedJob]


class Metadata(Object):
    name: Name


class JobSet(Object):
    apiVersion: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: Metadata
    spec: JobSetSpec


@pytest.fixture(scope="module")
def job_set(launch_files):
    return JobSet.model_validate(yaml.safe_load((launch_files / "jobset.yaml").read_text()))


@pytest.fixture(scope="module")
def job(job_set):
    (replicated,) = job_set.spec.replicatedJobs
    return replicated.template.spec


@pytest.fixture(scope="module")
def container(job):
    (found,) = job.template.spec.containers
    return found


def test_every_pod_is_a_process_of_one_run(job_set, job, container):
    given = {variable.name: variable.value for variable in container.env}
    for index in range(job.completions):
        found = group(given | {"JAX_PROCESS_ID": str(index)})
        assert (found.count, found.index) == (job.completions, index)
    (replicated,) = job_set.spec.replicatedJobs
    name, service = job_set.metadata.name, job_set.spec.network.subdomain or job_set.metadata.name
    assert found.host == f"{name}-{replicated.name}-0-0.{service}" and job_set.spec.network.enableDNSHostnames
    assert job.parallelism == job.completions and replicated.replicas == 1 and job.completionMode == "Indexed"


def test_the_number_of_a_process_is_that_of_its_pod(container):
    (variable,) = (variable for variable in container.env if variable.valueFrom)
    assert variable.name == "JAX_PROCESS_ID"
    assert variable.valueFrom.fieldRef.fieldPath == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def test_a_lost_pod_restarts_all_and_a_run_that_cannot_go_on_does_not(job_set, job, container):
    (rule,) = job.podFailurePolicy.rules
    assert rule.onExitCodes.values == [2, 3, 5] and rule.onExitCodes.containerName == container.name
    assert job.template.spec.restartPolicy == "Never" and job.backoffLimit == 0
    (whole,) = job_set.spec.failurePolicy.rules
    assert whole.action == "FailJobSet" and whole.onJobFailureReasons == ["PodFailurePolicy"]


def test_the_run_is_on_a_volume_that_all_pods_have(job, container):
    mounted = {mount.name: mount.mountPath for mount in container.volumeMounts}
    volumes = {volume.name: volume for volume in job.template.spec.volumes}
    assert set(mounted) == set(volumes)
    directory = next(word.partition("=")[2] for word in container.command if word.startswith("run.dir="))
    shared = [path for name, path in mounted.items() if volumes[name].persistentVolumeClaim]
    assert any(directory.startswith(f"{path}/") for path in shared)


def test_the_command_is_valid(container):
    program, verb, *keys = container.command
    assert (program, verb) == ("efficient-lm", "train")
    assert validate(RunConfig, compose("train", keys).values).run.dir == "/shared/runs/one"
