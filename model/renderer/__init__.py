"""The shelf renderer: pictures of shelves with exact boxes and masks."""
