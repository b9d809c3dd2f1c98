"""Helpers with assertions in them say what failed, as a test does, if pytest rewrites them before they are imported."""

import pytest

pytest.register_assert_rewrite("hostile_folders")
