"""What a provider demands of every job: versioned documents, and the run that a job becomes under one."""

from holdtrue.service.policy.document import PolicyDocument, RefusalError, check_paths, default_document, parse_policy
from holdtrue.service.policy.resolve import JobRequest, resolve, settle

__all__ = [
    "JobRequest",
    "PolicyDocument",
    "RefusalError",
    "check_paths",
    "default_document",
    "parse_policy",
    "resolve",
    "settle",
]
