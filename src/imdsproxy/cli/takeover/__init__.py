"""`imdsproxy takeover KIND` and `imdsproxy handback KIND`: from Neutron's agents to imdsproxy, and back.

| module | is |
|---|---|
| `plan.py` | pure: what is observed (`Seen`), steps (`Step`) and the actions that they take, what refuses a plan |
| `KIND.py` | pure: a `Kind`, which makes the steps of both directions out of what is observed |
| `genuine.py` | pure: which processes are an agent, and not another user's |
| `agents.py` | finds the agents that run, reads and changes their settings files |
| `observe.py` | looks at the host, and at the daemon, for a `Seen` |
| `act.py` | takes the actions, one after the other; each can be taken again, and ends at once where all is done |
| `command.py` | both commands: plan, then report |

To add a kind: a module of its name with a `KIND`, and the name in `command.KINDS`. What it needs to be done is one of
the actions in `plan.py`, or a new one there with its case in `act.py`.
"""
