#!/bin/sh
# What cloud-init made of this guest, over the second serial line: "name content-in-hexadecimal", a line each.

exec >/dev/ttyS1
say() {
    printf '%s %s\n' "$1" "$(od -An -v -tx1 | tr -d ' \n')"
}

cloud-init status --wait --long 2>&1 | say status
hostname | say hostname
cat /var/lib/cloud/data/instance-id 2>&1 | say instance-id
cat /home/debian/.ssh/authorized_keys 2>&1 | say authorized-keys
cat /var/lib/user-data-effect 2>&1 | say user-data-effect
grep -v '\[DEBUG\]' /var/log/cloud-init.log 2>&1 | say log
exec systemctl poweroff --force --force
