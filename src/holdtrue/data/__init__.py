"""Chat data: reading and checking it, encoding it with exact response masks, keeping it prepared on disk."""

from holdtrue.data.builtins import builtin, builtin_name, builtin_names, resolve_data
from holdtrue.data.chat import KINDS, ChatRow, ChatSummary, Message, read_chat, read_valid, validate_chat
from holdtrue.data.encode import ChatEncoder, Encoded
from holdtrue.data.jsonl import json_name, read_jsonl, text_fault
from holdtrue.data.prepare import KindCount, Prepared, load_prepared, prepare_rows
from holdtrue.data.probes import Probe, Probes, read_probes

__all__ = [
    "KINDS",
    "ChatEncoder",
    "ChatRow",
    "ChatSummary",
    "Encoded",
    "KindCount",
    "Message",
    "Prepared",
    "Probe",
    "Probes",
    "builtin",
    "builtin_name",
    "builtin_names",
    "json_name",
    "load_prepared",
    "prepare_rows",
    "read_chat",
    "read_jsonl",
    "read_probes",
    "read_valid",
    "resolve_data",
    "text_fault",
    "validate_chat",
]
