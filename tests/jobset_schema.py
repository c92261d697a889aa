"""JSON schema of a JobSet (v1alpha2), its Job and its pods: the fields that the launch scripts use, no others."""


def _object(required: dict, optional: dict | None = None) -> dict:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": sorted(required),
        "additionalProperties": False,
    }


def _list(item: dict) -> dict:
    return {"type": "array", "items": item, "minItems": 1}


NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
CONST = lambda value: {"const": value}  # noqa: E731

VOLUME_SOURCE = {
    "csi": _object(
        {"driver": CONST("gcsfuse.csi.storage.gke.io"), "volumeAttributes": STRINGS},
        {"readOnly": {"type": "boolean"}},
    ),
    "persistentVolumeClaim": _object({"claimName": NAME}),
}
VOLUME = {"oneOf": [_object({"name": NAME, key: value}) for key, value in VOLUME_SOURCE.items()]}
SECRET = _object({"name": NAME, "key": TEXT}, {"optional": {"type": "boolean"}})
TPUS = _object({"google.com/tpu": {"type": "integer", "minimum": 1}})
CONTAINER = _object(
    {
        "name": NAME,
        "image": TEXT,
        "args": _list({"type": "string"}),
        "resources": _object({"requests": TPUS, "limits": TPUS}),
        "volumeMounts": _list(_object({"name": NAME, "mountPath": TEXT})),
    },
    {
        "env": _list(_object({"name": TEXT, "valueFrom": _object({"secretKeyRef": SECRET})})),
        "ports": _list(_object({"containerPort": {"type": "integer", "maximum": 65535}})),
    },
)
POD = _object(
    {
        "restartPolicy": CONST("Never"),
        "terminationGracePeriodSeconds": COUNT,
        "serviceAccountName": NAME,
        "nodeSelector": _object(
            {
                "cloud.google.com/gke-tpu-accelerator": TEXT,
                "cloud.google.com/gke-tpu-topology": TEXT,
            }
        ),
        "containers": _list(CONTAINER),
        "volumes": _list(VOLUME),
    }
)
EXIT_CODES = _object({"containerName": NAME, "operator": CONST("In"), "values": _list(COUNT)})
JOB = _object(
    {
        "parallelism": COUNT,
        "completions": COUNT,
        "completionMode": CONST("Indexed"),
        "backoffLimit": COUNT,
        "podFailurePolicy": _object(
            {"rules": _list(_object({"action": CONST("FailJob"), "onExitCodes": EXIT_CODES}))}
        ),
        "template": _object(
            {"metadata": _object({}, {"labels": STRINGS, "annotations": STRINGS}), "spec": POD}
        ),
    }
)
FAILURE_RULE = _object(
    {
        "name": NAME,
        "action": CONST("FailJobSet"),
        "onJobFailureReasons": CONST(["PodFailurePolicy"]),
    }
)
JOBSET = _object(
    {
        "apiVersion": CONST("jobset.x-k8s.io/v1alpha2"),
        "kind": CONST("JobSet"),
        "metadata": _object(
            {"name": NAME, "namespace": NAME}, {"labels": STRINGS, "annotations": STRINGS}
        ),
        "spec": _object(
            {
                "failurePolicy": _object({"maxRestarts": COUNT, "rules": _list(FAILURE_RULE)}),
                "replicatedJobs": _list(
                    _object({"name": NAME, "replicas": COUNT, "template": _object({"spec": JOB})})
                ),
            }
        ),
    }
)
