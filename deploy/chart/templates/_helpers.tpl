{{- define "warren.labels" -}}
app.kubernetes.io/name: warren
app.kubernetes.io/part-of: warren
{{- end }}

{{- define "warren.selector" -}}
app.kubernetes.io/name: warren
{{- end }}

{{- define "warren.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* YAML 1.1 reads a bare on or off as a boolean. */}}
{{- define "warren.switch" -}}
{{- if kindIs "bool" . }}{{ ternary "on" "off" . }}{{ else }}{{ . }}{{ end -}}
{{- end }}

{{/* Each distribution's places; an empty value is filled in from here. */}}
{{- define "warren.places" -}}
{{- $given := dict
      "confDir" .Values.cni.confDir "binDir" .Values.cni.binDir "binTree" .Values.cni.binTree
      "apiServer" (join "," .Values.apiServer) "kubeletKubeconfig" .Values.kubeletKubeconfig -}}
{{- $presets := dict
      "kubeadm" (dict "kubeletKubeconfig" "/etc/kubernetes/kubelet.conf")
      "k3s" (dict
        "confDir" "/var/lib/rancher/k3s/agent/etc/cni/net.d"
        "binDir" "/var/lib/rancher/k3s/data/cni"
        "binTree" "/var/lib/rancher/k3s/data"
        "apiServer" "https://127.0.0.1:6444")
      "microk8s" (dict
        "confDir" "/var/snap/microk8s/current/args/cni-network"
        "binDir" "/var/snap/microk8s/current/opt/cni/bin"
        "apiServer" "https://127.0.0.1:16443") -}}
{{- $preset := get $presets .Values.distribution | default dict -}}
{{- $default := dict "confDir" "/etc/cni/net.d" "binDir" "/opt/cni/bin" -}}
{{- $places := dict -}}
{{- range $key, $value := $given -}}
{{- $_ := set $places $key ($value | default (get $preset $key) | default (get $default $key)) -}}
{{- end -}}
{{- if not (get $places "binTree") -}}
{{- $_ := set $places "binTree" (get $places "binDir") -}}
{{- end -}}
{{ toJson $places }}
{{- end }}

{{/* The agent's settings, as environment variables; an empty value is no variable. */}}
{{- define "warren.env" -}}
{{- $values := .Values -}}
{{- $places := include "warren.places" . | fromJson -}}
{{- $env := list
      (list "WARREN_SOURCE" $values.source)
      (list "WARREN_API_SERVER" $places.apiServer)
      (list "WARREN_KUBELET_KUBECONFIG" $places.kubeletKubeconfig)
      (list "WARREN_CLUSTER_CIDR" (join "," $values.clusterCidr))
      (list "WARREN_SERVICE_CIDR" (join "," $values.serviceCidr))
      (list "WARREN_LOCATION" $values.location)
      (list "WARREN_ENCAP" $values.encap)
      (list "WARREN_LANES" $values.lanes)
      (list "WARREN_LISTEN_PORT" $values.port)
      (list "WARREN_VXLAN_PORT" $values.vxlanPort)
      (list "WARREN_VNI" $values.vni)
      (list "WARREN_KEEPALIVE" $values.keepalive)
      (list "WARREN_UNDERLAY_MTU" $values.underlayMtu)
      (list "WARREN_SERVICES" (include "warren.switch" $values.services))
      (list "WARREN_NODEPORT_ADDRESSES" (join "," $values.nodePortAddresses))
      (list "WARREN_NODEPORT_LOCALHOST" $values.nodePortLocalhost)
      (list "WARREN_EXTERNAL_IPS" (include "warren.switch" $values.externalIPs))
      (list "WARREN_HEALTHZ_BIND_ADDRESS" $values.healthzBindAddress)
      (list "WARREN_PROBE_BIND_ADDRESS" (printf "127.0.0.1:%v" (int $values.probePort)))
      (list "WARREN_MASQUERADE" (include "warren.switch" $values.masquerade))
      (list "WARREN_LOG" $values.log) -}}
{{- range $env }}
{{- /* Numbers of a values file are floating-point ones to Helm. */}}
{{- $value := last . -}}
{{- if kindIs "float64" $value }}{{ $value = int64 $value }}{{ end }}
{{- if ne (toString $value) "" }}
- name: {{ first . }}
  value: {{ toString $value | quote }}
{{- end }}
{{- end }}
{{- end }}
