"""`imdsproxy takeover KIND` and `imdsproxy handback KIND`: from Neutron's agents to imdsproxy, and back.

| module | content |
|---|---|
| `plan.py` | pure: observed state (`Seen`), steps (`Step`), actions, and a kind's interface (`Kind`) |
| `KIND.py` | pure: a `Kind`, which computes the steps of both directions from the observed state |
| `genuine.py` | pure: tells agents from other users' processes |
| `agents.py` | finds running agents, reads and changes their settings files |
| `observe.py` | reads the host's and the daemon's state into a `Seen` |
| `act.py` | executes the actions in order; actions are idempotent |
| `command.py` | both commands: plan, then report |

To add a kind, write a module of that name with a `KIND` and add the name to `command.KINDS`. Its steps use the actions
in `plan.py`; a new action also needs a case in `act.py`.
"""
