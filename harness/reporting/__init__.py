"""What people read: tables, the paper's tables, plots, comparisons and the report page."""
