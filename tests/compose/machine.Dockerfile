# A host as an administrator hands it over: systemd, an SSH server, a Docker engine, and nothing of the kit.
ARG BASE
FROM ${BASE}
RUN apt-get -q update \
    && apt-get -q install -y --no-install-recommends dbus docker.io git iproute2 iptables libnuma1 libpam-systemd make \
        openssh-server procps python3 systemd-sysv xz-utils \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*
# Its own keys, when it starts for the first time.
RUN mkdir /etc/systemd/system/ssh.service.d \
    && printf '[Service]\nExecStartPre=\nExecStartPre=/usr/bin/ssh-keygen -A\nExecStartPre=/usr/sbin/sshd -t\n' \
        >/etc/systemd/system/ssh.service.d/keys.conf
STOPSIGNAL SIGRTMIN+3
CMD ["/sbin/init"]
