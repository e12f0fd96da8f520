"""Ctrl-C at a chosen moment."""


def stopped_at(monkeypatch, owner, name, when, run, what=KeyboardInterrupt):
    """What ``run`` returns if call number ``when`` of a method raises ``what``, and the number of calls."""
    count, method = 0, getattr(owner, name)

    def counted(self, x):
        nonlocal count
        count += 1
        if count == when:
            raise what
        return method(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        return run(), count
