"""A paper's table: its runs, what was kept of them, and the page that sets paper and ours side by side."""
