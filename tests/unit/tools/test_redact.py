"""What is removed from a bundle's text, and what is left."""

from hypothesis import example, given
from hypothesis import strategies as st

from imdsproxy.tools.bundle.plan import LEAST_SECRET, REMOVED, Redactor
from support.spelled import spellings_of

_SECRETS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp")),
    min_size=LEAST_SECRET,
)


@given(secret=_SECRETS, around=st.text("ab -/", max_size=3), number=st.integers(0, 13))
@example(secret="hunter2", around="", number=0)
def test_a_known_secret_is_removed_in_every_spelling(secret: str, around: str, number: int) -> None:
    every = [one for one in spellings_of(secret.encode()) if len(one) >= LEAST_SECRET]
    spelled = every[number % len(every)]
    redactor = Redactor.of([secret.encode()], [])
    assert spelled not in redactor.clean(f"{around}{spelled}{around}").replace(REMOVED, "\0")


def test_each_line_of_user_data_and_each_value_in_it_is_removed_wherever_it_stands_alone() -> None:
    data = (
        b'#cloud-config\npassword: "corr ect/horse"\nruncmd:\n- curl -u admin:Tr0ub4dor http://x\n'
    )
    redactor = Redactor.of([], [data])
    for leaked in ("corr ect/horse", "Tr0ub4dor", "curl -u admin:Tr0ub4dor", "Y29yciBlY3QvaG9yc2"):
        assert leaked not in redactor.clean(f"line 3: {leaked} is refused")


def test_a_line_that_a_log_cut_off_is_removed_as_far_as_it_goes() -> None:
    redactor = Redactor.of([], [b"export TOKEN=0123456789abcdef0123456789\n"])
    assert redactor.clean("refused: export TOKEN=0123456789abc…") == f"refused: {REMOVED}…"


def test_what_overlaps_is_removed_as_a_whole() -> None:
    redactor = Redactor.of([b"abcdef", b"defghi"], [])
    assert redactor.clean("abcdefghi") == REMOVED


def test_names_of_instances_and_words_of_every_log_stay_though_user_data_has_them() -> None:
    data = b"hostname: web-server-1\npackages:\n- network manager\n"
    text = '{"network": "blue", "instance": "web-server-1", "packages": 3}'
    assert Redactor.of([], [data], [b"web-server-1"]).clean(text) == text


def test_what_looks_like_a_secret_is_removed_though_it_is_not_known() -> None:
    token = f"0123abcd.1796112210.{'A-_z' * 10}abc"
    key = "-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----"
    text = f"a {token} b {'0f' * 32} c {key} d http://me:word@nova/ e ssh-ed25519 {'A' * 68} f"
    assert Redactor.of([], []).clean(text) == (
        f"a {REMOVED} b {REMOVED} c {REMOVED} d http://{REMOVED}@nova/ e {REMOVED} f"
    )
